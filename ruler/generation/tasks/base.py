"""What all tasks share: the random streams, the prompt as pieces, and the interface that the fitting drives.

A generator turns random streams and a size into a `Sample`. It knows nothing of budgets; `fitting.py` looks for
the size that fills one. Sizes are in the task's own unit (words, lines, documents).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from ruler.generation.templates import ChatTemplate
from ruler.registry import TaskConfig
from utils.errors import DatasetError

if TYPE_CHECKING:
    from numpy.random import RandomState

    from ruler.generation.counting import PieceCounter

_Item = TypeVar("_Item")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# The same text in its sentences: what fills a remainder too small for a whole line.
NOISE_SENTENCES = (
    "\nThe grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)


class SampleFailed(Exception):
    """This draw cannot become a sample. The streams have moved on; the caller draws again."""


class NotFullError(DatasetError):
    """No size of sample fills the length well: one is too long, the next smaller one leaves too much room."""


class TooShortError(DatasetError):
    """Rows do not fit into the length that was asked for.

    Attributes:
        fact: What does not fit, and why.
        needed: Tokens that the row at hand needs, and others may need more; None where that is not known.
        num_rows: How many rows, all that were asked for, fit into `needed`; None where that was not tried.
    """

    def __init__(self, fact: str, needed: int | None, num_rows: int | None = None) -> None:
        super().__init__(fact, needed, num_rows)
        self.fact, self.needed, self.num_rows = fact, needed, num_rows

    def __str__(self) -> str:
        if self.num_rows:
            enough = f"{self.needed}, which is enough for the {self.num_rows} rows"
        else:
            enough = f"{self.needed} or more" if self.needed else "more"
        return f"{self.fact}; use a --max-seq-length of {enough}"


class Streams:
    """The random streams of one run of samples, as the reference seeds them.

    Attributes:
        seed: Seeds both streams and every `shuffled`.
        random: Python's stream.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)

    @cached_property
    def numpy(self) -> RandomState:
        """NumPy's legacy stream; few tasks need it and importing NumPy takes a while."""
        from numpy.random import RandomState

        return RandomState(self.seed)

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """`items` shuffled by a fresh stream of the same seed: the same order for every list of that length."""
        return [items[index] for index in _permutation(self.seed, len(items))]


@lru_cache(maxsize=64)
def _permutation(seed: int, length: int) -> list[int]:
    order = list(range(length))
    Random(seed).shuffle(order)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt, in pieces that are cut where tokens are (see `ruler/generation/counting.py`).

    Attributes:
        head: Pieces before the context.
        context: Pieces of the context, the part a compressor may wrap.
        tail: Pieces behind the context, up to the end of the answer prefix.
        outputs: The answers.
        others: What scoring needs beside them; it goes with the row to its prediction.
    """

    head: list[str]
    context: list[str]
    tail: list[str]
    outputs: list[str]
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def pieces(self) -> list[str]:
        """All pieces in order."""
        return [piece for piece in (*self.head, *self.context, *self.tail) if piece]

    def extended(self, filler: Sequence[str]) -> Sample:
        """The sample with `filler` at the end of its context."""
        return replace(self, context=[*self.context, *filler])

    def on_one_line(self) -> Sample:
        """The sample with every run of whitespace as one space, as `--remove-newline-tab` wants it."""
        head, context, tail = (one_line("".join(part)) for part in (self.head, self.context, self.tail))
        # Every template has whitespace on both sides of its context.
        return replace(self, head=[head], context=[" " + context] if context else [], tail=[" " + tail])


def one_line(text: str) -> str:
    """`text` with every run of whitespace as one space, stripped."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Prompt:
    """A task's template within a chat template, cut at its context.

    Attributes:
        task: Where the task template and the answer prefix come from.
        chat: The chat template around them.
        edits: Replacements over the whole template, before its fields are filled in.
    """

    task: TaskConfig
    chat: ChatTemplate
    edits: tuple[tuple[str, str], ...] = ()

    def before(self) -> str:
        """The chat template's text before the prompt."""
        return self._edited(self.chat.before)

    def head(self, **fields: object) -> str:
        """The task template up to the context."""
        return self._edited(self.task.template.partition("{context}")[0]).format(**fields)

    def tail(self, **fields: object) -> str:
        """Everything behind the context: rest of the template, chat template, answer prefix."""
        rest = self._edited(self.task.template.partition("{context}")[2]).format(**fields)
        return rest + self._edited(self.chat.behind) + self._edited(self.task.answer_prefix).format(**fields)

    def _edited(self, text: str) -> str:
        for old, new in self.edits:
            text = text.replace(old, new)
        return text


@dataclass
class TaskGenerator:
    """Makes samples of one task; subclasses say how.

    Attributes:
        task: The task.
        prompt: Its template.
        max_tokens: The budget, prompt and answer together.
        one_line: Samples are to be flattened to one line.
        step: Smallest size, and what a sample that is too long loses.
        calibration_size: Size of the first sample, which measures tokens per unit.
        extra_tokens: Tokens that samples have and probes have not.
    """

    task: TaskConfig
    prompt: Prompt
    max_tokens: int
    one_line: bool = False
    step: int = 10
    calibration_size: int = 0
    extra_tokens: int = field(default=0, init=False)

    def begin(self, streams: Streams, counter: PieceCounter) -> None:
        """Draw what all samples of a run share."""

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        """Draw one sample.

        Args:
            streams: Where the draws come from.
            size: In units of the task.
            number: Number of the sample in its dataset.
            depths: Where in the context the wanted parts go, each in [0, 1); the reference's rule without them.

        Raises:
            SampleFailed: This draw cannot become a sample.
        """
        raise NotImplementedError

    def probe(self, streams: Streams, size: int) -> Sample | None:
        """Draw a sample to be measured only; None where it is sure to be over the budget.

        The streams move exactly as for a full sample.
        """
        return self.sample(streams, size, 0)

    def attempts(self, streams: Streams, size: int, number: int) -> Iterator[Sample]:
        """Samples of shrinking size, for the caller to take the first that fits."""
        while True:
            with contextlib.suppress(SampleFailed):
                yield self.sample(streams, size, number)
            if size <= self.step:
                return
            size -= self.step

    def largest_size(self, tokens_per_unit: float) -> int:
        """Upper end of the search for the size."""
        return max(int(self.max_tokens / tokens_per_unit * 3), 2 * self.step)

    def fit(self, streams: Streams, count: Callable[[Sample], int]) -> int:
        """The size that a run of samples starts with: calibrate, then bisect, drawing a probe each time."""
        calibrating = self.calibration_size or self.step
        first = self.probe(streams, calibrating)
        low = best = self.step
        # Larger than the budget already: nothing larger needs to be looked at.
        high = self.largest_size(count(first) / calibrating) if first else 0
        room = self.max_tokens - self.extra_tokens - self.task.tokens_to_generate
        while low <= high:
            middle = (low + high) // 2
            probe = self.probe(streams, middle)
            if probe and count(probe) <= room:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    # ---- balanced mode ----

    num_depths = 0

    def smallest_size(self) -> int:
        """Smallest size of a sample in balanced mode."""
        return 1

    def filler(self, streams: Streams, sample: Sample) -> list[str]:
        """Small pieces that may follow the context, in order, where a whole unit more does not fit."""
        return []


def line_pieces(lines: Sequence[str]) -> list[str]:
    """Lines joined by line ends, as pieces of one line each."""
    return [line + "\n" for line in lines[:-1]] + list(lines[-1:])
