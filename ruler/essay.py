"""The essay haystack: sentences of its first n words, for many n, without splitting or counting anything twice.

A boundary depends on the words beside it, so the sentences of a shorter text are those of a longer one up to the
word before its end; only the last sentences are split again. The text repeats itself where n is larger.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ruler.counting import PieceCounter
from ruler.sentences import SentenceSplitter, english_splitter

_BLOCK_WORDS = 8192
_UNSETTLED = 2  # sentences at the end of a block that the next block may change


class Essay:
    """A text as words, with the sentences found so far."""

    def __init__(self, words: Sequence[str], counter: PieceCounter, splitter: SentenceSplitter | None = None) -> None:
        """Args:
        words: The text split at single spaces.
        counter: Counts the sentences.
        splitter: Finds them; English by default.
        """
        self._words = words
        self._counter = counter
        self._splitter = splitter or english_splitter()
        self._text = ""
        self._ends: list[int] = []  # where each word of _text ends
        self._starts: list[int] = []  # where each settled sentence starts
        self._stops: list[int] = []
        self._pieces: list[str] = []  # " " + each settled sentence
        self._unsettled = 0  # where the rest of _text starts
        self._tokens = [0]  # tokens of the first k settled sentences

    def sentence_pieces(self, num_words: int) -> list[str]:
        """Sentences of the first `num_words` words, each with a space before it."""
        while len(self._ends) < num_words:
            self._read_block()
        if num_words < 1:
            return []
        end = self._ends[num_words - 1]
        last_word = self._ends[num_words - 2] if num_words > 1 else 0
        settled = max(bisect_right(self._stops, last_word) - 1, 0)
        while settled and self._text[self._starts[settled] - 1] != " ":
            settled -= 1
        start = self._starts[settled] if settled else 0
        return self._pieces[:settled] + [" " + text for text in self._splitter.split(self._text[start:end].strip())]

    def surely_longer(self, num_words: int, max_tokens: int) -> bool:
        """Whether the first `num_words` words have more than `max_tokens` tokens; False where it is not clear."""
        if not self._counter.adds_up:
            return False
        while True:
            for tokens in self._counter.count_each(self._pieces[len(self._tokens) - 1 :]):
                self._tokens.append(self._tokens[-1] + tokens)
            if self._tokens[-1] > max_tokens or len(self._ends) >= num_words:
                break
            self._read_block()
        too_many = bisect_right(self._tokens, max_tokens)  # so many sentences have more tokens than that
        return too_many < len(self._tokens) and self._within(too_many, num_words)

    def _within(self, num_sentences: int, num_words: int) -> bool:
        """Whether the first `num_sentences` settled sentences end before the word `num_words` begins."""
        if num_words > len(self._ends):
            return True
        return num_words > 1 and self._stops[num_sentences - 1] <= self._ends[num_words - 2]

    def _read_block(self) -> None:
        known = len(self._ends)
        total = len(self._words)
        block = [self._words[number % total] for number in range(known, known + _BLOCK_WORDS)]
        position = len(self._text)
        for word in block:
            position += len(word) + (1 if self._ends else 0)
            self._ends.append(position)
        self._text = f"{self._text} {' '.join(block)}" if known else " ".join(block)
        offset = self._unsettled
        offset += len(self._text[offset:]) - len(self._text[offset:].lstrip())
        spans = self._splitter.spans(self._text[offset:])
        for start, stop in spans[:-_UNSETTLED]:
            self._starts.append(start + offset)
            self._stops.append(stop + offset)
            self._pieces.append(" " + self._text[start + offset : stop + offset])
        if len(spans) > _UNSETTLED:
            self._unsettled = spans[-_UNSETTLED][0] + offset
