"""Common words: a numbered list in which ten words come often and all others seldom.

A solved example stands before each prompt. Sizes are different words.

Source: RULER, arXiv 2404.06654, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ruler.generation.tasks.base import Sample, Streams, TaskGenerator
from utils.errors import DatasetError


@dataclass
class CommonWords(TaskGenerator):
    """Generator of `cwe`.

    Attributes:
        words: The words to draw from.
        more_words: Gives a larger list, asked for only when a sample needs more words than `words` has.
    """

    words: Sequence[str] = ()
    more_words: Callable[[], Sequence[str]] = tuple

    def __post_init__(self) -> None:
        params = self.task.params
        self.step = 10
        self.calibration_size = 4096
        self._num_common: int = params["num_common"]
        if self.max_tokens < 4096:
            self._repeats, self._example = (6, 1), (20, 3, 1)
        else:
            self._repeats, self._example = (params["freq_common"], params["freq_rare"]), (40, 10, 3)

    @cached_property
    def _more_words(self) -> Sequence[str]:
        return self.more_words()

    def largest_size(self, tokens_per_unit: float) -> int:
        return max(int(self.max_tokens // tokens_per_unit) * 2, 2 * self.step)

    def smallest_size(self) -> int:
        return self._num_common

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        example, example_answers = self._draw_list(streams, *self._example)
        context, answers = self._draw_list(streams, size, *self._repeats)
        before, head, tail = self.prompt.before(), self.prompt.head(), self.prompt.tail()
        solved = "".join(f" {number}. {word}" for number, word in enumerate(example_answers, start=1))
        return Sample(
            head=[before, head, *example, tail, f"{solved}\n", before, head],
            context=context,
            tail=[tail],
            outputs=answers,
        )

    def _draw_list(self, streams: Streams, num_words: int, often: int, seldom: int) -> tuple[list[str], list[str]]:
        """Pieces of a numbered list, and its common words."""
        pool = self.words if num_words <= len(self.words) else self._more_words
        if num_words > len(pool):
            raise DatasetError(
                f"{self.task.name} at {self.max_tokens} tokens draws {num_words} different words, but there are only "
                f"{len(pool)}: give a larger english_words.json"
            )
        words = streams.random.sample(pool, num_words)
        common, rare = words[: self._num_common], words[self._num_common :]
        pieces: list[str] = []
        for number, word in enumerate(streams.shuffled(common * often + rare * seldom), start=1):
            pieces += (f" {number}.", f" {word}")
        pieces[0] = pieces[0].lstrip()
        return pieces, common
