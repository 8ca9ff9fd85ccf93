"""The essay haystack: sentences of its first n words, for many n, without splitting or counting anything twice.

RULER hides its needles between the sentences of an essay, so a benchmark file depends on every single boundary. They
are those of NLTK's Punkt with the parameters of `ruler/punkt_english`; nothing is downloaded. A boundary depends on
the words beside it, so the sentences of a shorter text are those of a longer one up to the word before its end; only
the last sentences are split again. The text repeats itself where n is larger.

    english_splitter().tokenize("Dr. Who came. He left.")       # ['Dr. Who came.', 'He left.']

Source: Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary Detection", 2006; nltk.tokenize.punkt.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ruler.generation.counting import PieceCounter
from utils.errors import DatasetError

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

ENGLISH = Path(__file__).parents[1] / "punkt_english"
_BLOCK_WORDS = 8192
_SEAM_TOKENS = 8  # what a block's tokens may lose where it meets the next
_UNSETTLED = 2  # sentences at the end of a block that the next block may change


@cache
def english_splitter(folder: Path = ENGLISH) -> PunktSentenceTokenizer:
    """NLTK's sentence tokenizer with the packaged English parameters, loaded once.

    Args:
        folder: Parameters in NLTK's `punkt_tab` format.

    Raises:
        DatasetError: A file of `folder` is missing.
    """
    # Takes more than a second, and only the essay tasks need it.
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params

    try:
        return PunktSentenceTokenizer(load_punkt_params(_PackagedPath(folder)))
    except FileNotFoundError as error:
        raise DatasetError(f"the English sentence data is incomplete: {error.filename} does not exist") from None


@dataclass(frozen=True)
class _PackagedPath:
    """What NLTK's reader asks of a path. NLTK's own paths open nothing outside of its download folders."""

    path: Path

    def join(self, name: str) -> _PackagedPath:
        return _PackagedPath(self.path / name)

    def open(self, encoding: str) -> TextIO:
        return self.path.open(encoding=encoding)


class Essay:
    """A text as words, with the sentences found so far."""

    def __init__(self, words: Sequence[str], counter: PieceCounter) -> None:
        """Args:
        words: The text split at single spaces.
        counter: Counts the sentences.
        """
        self._words = words
        self._counter = counter
        self._text = ""
        self._ends: list[int] = []  # where each word of _text ends
        self._spans: dict[str, list[tuple[int, int]]] = {}  # sentences of each different block
        self._starts: list[int] = []  # where each settled sentence starts
        self._stops: list[int] = []
        self._pieces: list[str] = []  # " " + each settled sentence
        self._blocks: list[int] = []  # settled sentences after each block
        self._unsettled = 0  # where the rest of _text starts
        self._tokens: list[tuple[int, int]] = []  # (settled sentences, their tokens) after each block

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
        rest = english_splitter().tokenize(self._text[start:end].strip())
        return self._pieces[:settled] + [" " + sentence for sentence in rest]

    def surely_longer(self, num_words: int, max_tokens: int) -> bool:
        """Whether the first `num_words` words have more than `max_tokens` tokens; False where it is not clear."""
        if not self._counter.adds_up:
            return False
        while len(self._ends) < num_words and not self._over(num_words, max_tokens):
            self._read_block()
        return self._over(num_words, max_tokens)

    def _over(self, num_words: int, max_tokens: int) -> bool:
        """Whether some blocks within the first `num_words` words have more than `max_tokens` tokens."""
        while len(self._tokens) < len(self._blocks):
            counted, tokens = self._tokens[-1] if self._tokens else (0, 0)
            settled = self._blocks[len(self._tokens)]
            new = self._counter.count(self._pieces[counted:settled]) - _SEAM_TOKENS
            self._tokens.append((settled, tokens + new))
        # Where the next to last of the words ends; the last one may still change a sentence.
        end = self._ends[min(num_words, len(self._ends)) - 2] if num_words > 1 and len(self._ends) > 1 else 0
        return any(
            tokens > max_tokens and self._stops[settled - 1] <= end for settled, tokens in self._tokens if settled
        )

    def _read_block(self) -> None:
        known = len(self._ends)
        total = len(self._words)
        # A block ends where the text ends, so that the repeated text has the same blocks again.
        period = total * math.ceil(_BLOCK_WORDS / total)
        stop = min(known + _BLOCK_WORDS, (known // period + 1) * period)
        block = [self._words[number % total] for number in range(known, stop)]
        position = len(self._text)
        for word in block:
            position += len(word) + (1 if self._ends else 0)
            self._ends.append(position)
        self._text = f"{self._text} {' '.join(block)}" if known else " ".join(block)
        offset = self._unsettled
        offset += len(self._text[offset:]) - len(self._text[offset:].lstrip())
        rest = self._text[offset:]
        if rest not in self._spans:
            self._spans[rest] = list(english_splitter().span_tokenize(rest))
        spans = self._spans[rest]
        for start, stop in spans[:-_UNSETTLED]:
            self._starts.append(start + offset)
            self._stops.append(stop + offset)
            self._pieces.append(" " + self._text[start + offset : stop + offset])
        self._blocks.append(len(self._stops))
        if len(spans) > _UNSETTLED:
            self._unsettled = spans[-_UNSETTLED][0] + offset
