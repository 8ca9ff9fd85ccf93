"""Which parts of a memory a packed row may show as text: whole lines, found once for each example.

    candidates = find_candidates(prompt.spans, ["What does area return?"], ["width * height"], tokenizers)
    candidates[0].tokens, candidates[0].holds_answer

They are independent of the chunk size, which is drawn when rows are packed, and a function of the example alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

import numpy as np

from utils.compress.select import Expansion, MemoryText, Question, select
from utils.model.expand import tokens_inside
from utils.model.prompt import MemorySpan, PromptTokenizers

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
# Where no word is cut in two.
_EDGE = r"(?:(?<!\w)|(?!\w))"
_MOST_LINES, _MOST_TOKENS = 4, 64
_MOST_ANSWERS, _MOST_BY_CHANCE = 3, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A run of whole lines that may stand as text.

    Attributes:
        span: Index of its memory span.
        tokens: Half-open range of the span's encoder tokens that lie wholly inside.
        ids: Decoder ids of its text, int32.
        holds_answer: Whether an answer of the example stands on these lines.
        selected: One of those that the selector chooses for a question of the example: they are shown together.
    """

    span: int
    tokens: tuple[int, int]
    ids: np.ndarray
    holds_answer: bool
    selected: bool = False


def find_candidates(
    spans: Sequence[MemorySpan], queries: Sequence[str], answers: Sequence[str], tokenizers: PromptTokenizers
) -> tuple[Candidate, ...]:
    """The lines of the first answers, a few runs of lines that hold no answer, and what the selector chooses.

    Between two of the first kinds there is at least one line, and none is a whole span. An answer that is longer than a
    segment may be has no lines of its own. The selector is asked one of the questions, drawn by chance, with a budget
    between 1/32 and 1/8 of the memory. None holds a control token of the decoder: as text it would be obeyed.

    Args:
        spans: Parsed memory, at any chunk size.
        queries: What is asked about it, in order; may be empty texts.
        answers: What is learnt about it, in order.
        tokenizers: Of the pair.

    Returns:
        In the memory's order, the selected ones behind the others.
    """
    texts = [MemoryText.of(span, tokenizers.encoder) for span in spans]
    memories = [_Memory.of(text) for text in texts]
    controls = {token for token, added in tokenizers.decoder.added_tokens_decoder.items() if added.special}
    found: list[tuple[int, int, int, bool]] = []
    holding: set[tuple[int, int]] = set()
    for number, answer in enumerate(answers):
        places = [(s, *run) for s, memory in enumerate(memories) for run in memory.runs_with(answer)]
        holding |= {(s, line) for s, first, stop in places for line in range(first, stop)}
        found += [(*place, True) for place in places[:1] if number < _MOST_ANSWERS and _is_apart(place, found)]
    # Not a generator of the run: the same row always has the same candidates.
    random = Random("\0".join([*(memory.text for memory in memories), *answers]))
    starts = [(s, line) for s, memory in enumerate(memories) for line in range(memory.num_lines)]
    most = len(found) + _MOST_BY_CHANCE
    for s, first in random.sample(starts, len(starts)):
        stop = min(first + random.randint(1, _MOST_LINES), memories[s].num_lines)
        free = not any((s, line) in holding for line in range(first, stop))
        if free and _is_apart((s, first, stop), found) and memories[s].may_show(first, stop):
            found.append((s, first, stop, False))
        if len(found) == most:
            break
    candidates = (
        Candidate(
            span=s,
            tokens=memories[s].tokens(first, stop),
            ids=_ids(memories[s].lines(first, stop), tokenizers),
            holds_answer=holds,
        )
        for s, first, stop, holds in sorted(found)
    )
    asked = random.choice(list(filter(str.strip, queries)) or [""])
    selected = _select(texts, asked, Fraction(round(2 ** random.uniform(5, 7)), 1024), tokenizers) if asked else []
    return tuple(c for c in (*candidates, *selected) if not controls & set(c.ids.tolist()))


def _select(
    memories: Sequence[MemoryText], query: str, share: Fraction, tokenizers: PromptTokenizers
) -> list[Candidate]:
    """What the selector chooses for a question."""
    chosen = select(memories, Question(query), Expansion(share=share))
    return [
        Candidate(
            span=number,
            tokens=tokens_inside(memory.offsets, begin, end),
            ids=_ids(memory.text[begin:end], tokenizers),
            holds_answer=False,
            selected=True,
        )
        for number, (memory, ranges) in enumerate(zip(memories, chosen, strict=True))
        for begin, end in ranges
    ]


def _ids(text: str, tokenizers: PromptTokenizers) -> np.ndarray:
    return np.array(tokenizers.decoder(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _is_apart(place: tuple[int, int, int], found: Sequence[tuple[int, int, int, bool]]) -> bool:
    """Whether there is a line between these lines and all others."""
    return all(place[0] != s or place[2] < first or stop < place[1] for s, first, stop, _ in found)


@dataclass(frozen=True)
class _Memory:
    """A span's lines; `borders` are the characters where they begin, and the text's end."""

    text: str
    borders: list[int]
    offsets: np.ndarray

    @classmethod
    def of(cls, memory: MemoryText) -> _Memory:
        ends = (match.end() for match in _LINE.finditer(memory.text))
        return cls(memory.text, [0, *ends], memory.offsets)

    @property
    def num_lines(self) -> int:
        return len(self.borders) - 1

    def lines(self, first: int, stop: int) -> str:
        return self.text[self.borders[first] : self.borders[stop]]

    def tokens(self, first: int, stop: int) -> tuple[int, int]:
        """Encoder tokens wholly inside these lines."""
        begin, end = self.borders[first], self.borders[stop]
        return tokens_inside(self.offsets, begin, end)

    def may_show(self, first: int, stop: int) -> bool:
        """Whether these lines are a part of the memory that is not too long, and say something."""
        inside = self.tokens(first, stop)
        short = 0 < inside[1] - inside[0] <= _MOST_TOKENS
        return short and stop - first < self.num_lines and not self.lines(first, stop).isspace()

    def runs_with(self, answer: str) -> Iterator[tuple[int, int]]:
        """The lines of each place of an answer, where they may be shown."""
        if not (wanted := answer.strip()):
            return
        for match in re.finditer(_EDGE + re.escape(wanted) + _EDGE, self.text):
            first = int(np.searchsorted(self.borders, match.start(), side="right")) - 1
            stop = int(np.searchsorted(self.borders, match.end()))
            if self.may_show(first, stop):
                yield first, stop
