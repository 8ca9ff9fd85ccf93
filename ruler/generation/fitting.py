"""From a generator and a budget to rows: the reference's way (`compat`) and ours (`balanced`).

compat: one pair of streams a dataset. A calibration sample, a bisection over sizes with a fresh sample each, then the
samples themselves at that one size; a sample that is too long is drawn again a step smaller. Byte for byte the
reference's rows, because every draw is made in its order.

balanced: streams of their own for every sample, seeded by (seed, task, length, number). Every sample is fitted to the
budget by itself and its needles lie at depths that cover the context evenly, so rows can be made in any order and
anywhere, and no row is short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ruler.generation.counting import PieceCounter
from ruler.generation.tasks.base import NotFullError, Sample, SampleFailed, Streams, TaskGenerator, TooShortError
from utils.errors import DatasetError

MIN_FILL = 0.98
_GOLDEN = (5**0.5 - 1) / 2
_MAX_REDRAWS = 100


@dataclass
class RowMaker:
    """Turns samples into rows.

    Attributes:
        generator: Makes the samples.
        counter: Measures them.
        reference_index: Write NIAH's `index` as the reference does: the character offset of the first answer.
    """

    generator: TaskGenerator
    counter: PieceCounter
    reference_index: bool = False

    def __post_init__(self) -> None:
        self._checked = not self.counter.adds_up

    def flat(self, sample: Sample) -> Sample:
        """The sample as it is written: on one line if that is wanted."""
        return sample.on_one_line() if self.generator.one_line else sample

    def measure(self, sample: Sample) -> int:
        """Tokens of a sample and its answer."""
        return self.counter.count(sample.pieces) + self.generator.task.tokens_to_generate

    def row(self, sample: Sample, number: int, length: int) -> dict[str, Any]:
        """The row of a finished sample, `length` tokens long."""
        head, context = "".join(sample.head), "".join(sample.context)
        text = head + context + "".join(sample.tail)
        # The reference looks the answer prefix up by its first ten characters.
        prefix_start = text.rfind(self.generator.task.answer_prefix[:10])
        prompt = text[:prefix_start]
        row = {
            "index": number,
            "input": prompt,
            "outputs": sample.outputs,
            "length": length,
            "length_w_model_temp": length,
            "answer_prefix": text[prefix_start:],
        }
        if self.generator.task.family == "niah":
            position = prompt.find(sample.outputs[0])
            row["token_position_answer"] = self.counter.count_before(sample.pieces, position)
            if self.reference_index:
                row["index"] = position
        leading = len(context) - len(context.lstrip(" ")) if self.generator.one_line else 0
        row["context_start"] = len(head) + leading
        row["context_end"] = len(head) + len(context)
        if sample.others:
            row["others"] = sample.others
        return row

    def check_whole(self, sample: Sample, length: int) -> None:
        """Count the first sample in one go as well.

        Raises:
            CountMismatchError: The parts do not add up to the whole for this tokenizer.
        """
        if self._checked:
            return
        self._checked = True
        whole = self.counter.count_whole("".join(sample.pieces)) + self.generator.task.tokens_to_generate
        if whole != length:
            raise CountMismatchError(f"{whole} tokens in one go, {length} in parts")


class CountMismatchError(Exception):
    """Counting in parts is wrong for this tokenizer; the caller starts again counting whole texts."""


def compat_rows(maker: RowMaker, seed: int, num_samples: int, first: int = 0) -> Iterator[dict[str, Any]]:
    """The rows that the reference writes.

    Args:
        maker: Makes rows.
        seed: Seed of the run.
        num_samples: How many.
        first: Number of the first question, for a chunk of a question-answering dataset.

    Raises:
        DatasetError: Not even the smallest sample fits the budget.
    """
    generator = maker.generator
    streams = Streams(seed)
    generator.begin(streams, maker.counter)
    size = generator.fit(streams, lambda sample: maker.counter.count(sample.pieces))
    for number in range(num_samples):
        sample, length = _first_that_fits(maker, streams, size, number + first)
        maker.check_whole(sample, length)
        yield maker.row(maker.flat(sample), number, length)


def _first_that_fits(maker: RowMaker, streams: Streams, size: int, number: int) -> tuple[Sample, int]:
    generator = maker.generator
    shortest: int | None = None
    for sample in generator.attempts(streams, size, number):
        # Variable tracking alone is measured as it is written; the reference flattens the others afterwards.
        if generator.task.family == "variable_tracking":
            sample = maker.flat(sample)
        length = maker.measure(sample)
        if length <= generator.max_tokens:
            return sample, length
        shortest = min(length, shortest or length)
    raise _does_not_fit(generator, shortest)


def balanced_row(maker: RowMaker, seed: int, number: int) -> dict[str, Any]:
    """Row `number` of a balanced dataset; the same whatever was made before.

    Raises:
        DatasetError: Not even the smallest sample fits the budget, or no size fills it to `MIN_FILL`.
    """
    generator, budget = maker.generator, maker.generator.max_tokens
    name = generator.task.name
    # The next points of a golden-ratio sequence, which covers [0, 1) evenly.
    offset, count = derive_seed(seed, name, budget, "depth") / 2**32, generator.num_depths
    depths = [(offset + (number * count + place) * _GOLDEN) % 1.0 for place in range(count)]
    for redraw in range(_MAX_REDRAWS):
        own_seed = derive_seed(seed, name, budget, number, redraw)
        try:
            sample = _fill_budget(maker, own_seed, number, depths)
        except SampleFailed:
            continue
        break
    else:
        raise DatasetError(f"{name}: no valid sample {number} in {_MAX_REDRAWS} draws")
    sample = maker.flat(sample)
    length = maker.measure(sample)
    if length < MIN_FILL * budget:
        raise NotFullError(f"{name}: sample {number} fills {length} of {budget} tokens, expected {MIN_FILL:.0%}")
    maker.check_whole(sample, length)
    return maker.row(sample, number, length)


def derive_seed(*parts: object) -> int:
    """A seed (32 bits) of its own for every combination of `parts`."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def _fill_budget(maker: RowMaker, own_seed: int, number: int, depths: Sequence[float]) -> Sample:
    """The largest sample of these streams that fits, topped up with small pieces."""
    generator, budget = maker.generator, maker.generator.max_tokens
    drawn: dict[int, tuple[Sample, int]] = {}

    def length_at(size: int) -> int:
        if size not in drawn:
            sample = generator.sample(Streams(own_seed), size, number, depths)
            drawn[size] = sample, maker.measure(maker.flat(sample))
        return drawn[size][1]

    low = generator.smallest_size()
    if length_at(low) > budget:
        raise _does_not_fit(generator, length_at(low))
    high = low + 1
    while length_at(high) <= budget:
        # Lengths grow almost linearly: aim a little beyond the budget, but never far on the word of a short stretch.
        per_unit = max((length_at(high) - length_at(low)) / (high - low), 0.01)
        aim = high + int((budget - length_at(high)) / per_unit * 1.02) + 1
        low, high = high, min(aim, 4 * high + 8)
    while high - low > 1:
        share = (budget - length_at(low)) / (length_at(high) - length_at(low))
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if length_at(middle) <= budget else (low, middle)
    sample = drawn[low][0]
    return _top_up(maker, sample, Streams(own_seed ^ 1)) if length_at(low) < budget else sample


def _top_up(maker: RowMaker, sample: Sample, streams: Streams) -> Sample:
    """As much filler as fits."""
    filler = maker.generator.filler(streams, sample)
    fits, too_many = 0, len(filler) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        length = maker.measure(maker.flat(sample.extended(filler[:middle])))
        fits, too_many = (middle, too_many) if length <= maker.generator.max_tokens else (fits, middle)
    return sample.extended(filler[:fits])


def _does_not_fit(generator: TaskGenerator, shortest: int | None) -> TooShortError:
    needed = f"its smallest sample needs {shortest}" if shortest else "no smaller sample can be drawn"
    return TooShortError(
        f"{generator.task.name} does not fit into {generator.max_tokens} tokens: {needed} with "
        f"{generator.task.tokens_to_generate} for the answer",
        shortest,
    )
