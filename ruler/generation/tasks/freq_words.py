"""Frequent words: made-up words whose counts follow Zipf's law; the answer is the three most frequent ones.

The most frequent "word" of all is `...`, which the question says to ignore. Sizes are words, before rounding down each
word's count.

Source: RULER, arXiv 2404.06654, section 3.3.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ruler.generation.tasks.base import Sample, Streams, TaskGenerator, TooShortError

_TOKENS_A_WORD = 50  # of the budget, for each different word
_MIN_WORDS = 4  # the one to ignore and the three answers
_ZETA_2 = math.pi**2 / 6  # Riemann's zeta(2), the sum of k ** -2


@dataclass
class FreqWords(TaskGenerator):
    """Generator of `fwe`."""

    def __post_init__(self) -> None:
        self._room = self.max_tokens - self.task.tokens_to_generate
        self._num_words = self._room // _TOKENS_A_WORD
        if self._num_words < _MIN_WORDS:
            least = _MIN_WORDS * _TOKENS_A_WORD + self.task.tokens_to_generate
            fact = f"{self.task.name} does not fit into {self.max_tokens} tokens: it needs {_MIN_WORDS} different words"
            raise TooShortError(fact, least)
        self.step = max(self._room // 32, 1)

    def fit(self, streams: Streams, count: Callable[[Sample], int]) -> int:
        """Grow one sample until it is too long, then step back."""
        words = self._draw_words(streams)
        size = self._room // self.task.params["word_length"]
        while count(self._assemble(streams, words, size)) < self._room:
            size += self.step
        return size - self.step

    def attempts(self, streams: Streams, size: int, number: int) -> Iterator[Sample]:
        # A shorter attempt keeps its words.
        words = self._draw_words(streams)
        while size > 0:
            yield self._assemble(streams, words, size)
            size -= self.step

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        return self._assemble(streams, self._draw_words(streams), size)

    def smallest_size(self) -> int:
        return 4 * 4 * 2  # every answer comes at least once

    def _draw_words(self, streams: Streams) -> list[str]:
        """Words by falling frequency."""
        length = self.task.params["word_length"]

        def draw_word() -> str:
            return "".join(streams.random.choices(string.ascii_lowercase, k=length))

        words = {draw_word() for _ in range(self._num_words)}
        while len(words) < self._num_words:
            words.add(draw_word())
        ranked = streams.shuffled(sorted(words))
        ranked[0] = "..."
        return ranked

    def _assemble(self, streams: Streams, words: list[str], size: int) -> Sample:
        text: list[str] = []
        for rank, word in enumerate(words, start=1):
            text += [f" {word}"] * int(size * rank**-2.0 / _ZETA_2)
        text = streams.shuffled(text)
        if text:
            text[0] = text[0].lstrip()
        return Sample(
            head=[self.prompt.before(), self.prompt.head()],
            context=text,
            tail=[self.prompt.tail()],
            outputs=words[1:4],
        )
