"""Which parts of a prompt's memory stay text: a pure function of the spans' texts, a query and a budget.

    expansion = Expansion(tokens=256)
    memories = [MemoryText.of(span, tokenizers.encoder) for span in prompt.spans]
    chosen = select(memories, Question(prompt.query), expansion)    # for each span the characters that stay text

A memory is cut into pieces: its lines, the long ones cut further, at sentences where there are any. A policy of
`policies/` gives each piece a score; the best that fit the budget are taken. Knows no torch; no model has to be at
hand. What is chosen here becomes rows of the prompt in `utils.model.expand`.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from utils.compress.policies.registry import POLICIES, WHOLE, find_policy
from utils.errors import ConfigError, PromptError
from utils.model.expand import CharRange, token_offsets
from utils.model.prompt import MemorySpan

# Longer lines are cut: a generated file of one line has pieces, too.
_MOST_PIECE_TOKENS = 64
# Where sentences end, a long line is cut sooner, so that one of them can be chosen without the others.
_SENTENCES_TOKENS = 32
# A line with its end and the empty lines behind it.
_LINE = re.compile(r"[^\n]*\n(?:[^\S\n]*\n)*|[^\n]+")
# Short, so that no exponent and no endless fraction has to be computed.
_SHARE = re.compile(r"[0-9]{1,9}/[0-9]{1,9}|[01](\.[0-9]{1,18})?|\.[0-9]{1,18}")
_SENTENCE_END = re.compile(r"[.!?;](?=\s)|[。！？]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansion:
    """How much of a prompt's memory stays text, and which part.

    Attributes:
        tokens: Most encoder tokens that stay text, of all spans of a prompt together.
        share: The same as a share of the prompt's memory tokens, at most 1; instead of `tokens`.
        policy: A name of `POLICIES`.
        query: What to select by; None for what the prompt asks.

    Raises:
        ConfigError: Both or neither of `tokens` and `share` for a policy that needs one, a negative or too large one,
            an unknown policy, an empty query.
    """

    tokens: int | None = None
    share: Fraction | None = None
    policy: str = "bm25"
    query: str | None = None

    def __post_init__(self) -> None:
        find_policy(self.policy)
        if self.tokens is not None and self.share is not None:
            raise ConfigError("give the text's budget as tokens or as a share of the memory, not both")
        if self.tokens is None and self.share is None and self.policy not in WHOLE:
            raise ConfigError(f"the policy {self.policy} needs a budget: --expand-tokens 256, or --expand 1/16")
        if self.tokens is not None and self.tokens < 0:
            raise ConfigError(f"--expand-tokens must not be negative, got {self.tokens}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(f"--expand must be a share from 0 to 1, got {self.share}")
        if self.query is not None and not self.query.strip():
            raise ConfigError("--expand-query is empty: leave it out to select by what the prompt asks")

    @property
    def is_off(self) -> bool:
        """No budget: all of the memory becomes latents."""
        return self.policy == "none" or (self.policy not in WHOLE and not (self.tokens or self.share))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, for manifests."""
        return {**asdict(self), "share": None if self.share is None else str(self.share)}

    def budget(self, memory_tokens: int) -> int:
        """Tokens that stay text of a prompt with so many memory tokens."""
        if self.policy in WHOLE:
            return memory_tokens
        return self.tokens if self.tokens is not None else int(memory_tokens * (self.share or 0))


def read_share(value: Any) -> Fraction | None:
    """A share of the memory from 0 to 1, of a number or a text such as "1/16"; None for what is none."""
    if not (type(value) in (int, float) or (isinstance(value, str) and _SHARE.fullmatch(value))):
        return None
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return None
    return share if 0 <= share <= 1 else None


@dataclass(frozen=True)
class MemoryText:
    """A span as selection sees it.

    Attributes:
        text: Its characters, those of its tokens: less what was truncated.
        offsets: [N, 2] characters of each encoder token.
        chunk_size: Encoder tokens per latent.
        barred: A piece that matches this never stays text, for example one with a control token of the decoder.
    """

    text: str
    offsets: np.ndarray
    chunk_size: int = 1
    barred: re.Pattern[str] | None = None

    @classmethod
    def of(cls, span: MemorySpan, tokenizer: Any, barred: re.Pattern[str] | None = None) -> MemoryText:
        """The text of a parsed span.

        Raises:
            ConfigError: The encoder's tokenizer is not a fast one.
        """
        offsets = token_offsets(tokenizer, span.text, len(span.token_ids))
        text = span.text[: offsets[-1, 1]] if span.truncated_tokens else span.text
        return cls(text, offsets, span.chunk_size, barred)

    @cached_property
    def pieces(self) -> list[CharRange]:
        """Half-open ranges of characters, end to end: lines with their ends, long ones cut."""
        ends = [match.end() for match in _LINE.finditer(self.text)]
        lines = list(itertools.pairwise([0, *ends]))
        first, stop = self._token_ranges(lines)
        pieces: list[CharRange] = []
        for (begin, end), num_tokens in zip(lines, (stop - first).tolist(), strict=True):
            pieces += [(begin, end)] if num_tokens <= _MOST_PIECE_TOKENS else self._cut(begin, end)
        return pieces

    @cached_property
    def piece_texts(self) -> list[str]:
        """The pieces' characters."""
        return [self.text[begin:end] for begin, end in self.pieces]

    @cached_property
    def piece_tokens(self) -> list[tuple[int, int]]:
        """For each piece the half-open range of tokens that have a character in it; neighbours may share one."""
        first, stop = self._token_ranges(self.pieces)
        return list(zip(first.tolist(), stop.tolist(), strict=True))

    @cached_property
    def barred_pieces(self) -> set[int]:
        """Numbers of the pieces that hold a part of something barred."""
        matches = self.barred.finditer(self.text) if self.barred else ()
        return {piece for match in matches for piece in self.pieces_in(*match.span())}

    def pieces_in(self, begin: int, end: int) -> range:
        """Numbers of the pieces that have a character in a range that is not empty."""
        return range(bisect(self._piece_ends, begin), bisect(self._piece_ends, end - 1) + 1)

    @cached_property
    def _piece_ends(self) -> list[int]:
        return [end for _, end in self.pieces]

    def _token_ranges(self, pieces: Sequence[CharRange]) -> tuple[np.ndarray, np.ndarray]:
        begins, ends = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
        first = np.searchsorted(self.offsets[:, 1], begins, side="right")
        return first, np.maximum(first, np.searchsorted(self.offsets[:, 0], ends))

    def _cut(self, begin: int, end: int) -> list[CharRange]:
        """A long line in pieces: where sentences end, else before white space, else between tokens."""
        line_end = begin + len(self.text[begin:end].rstrip())
        sentence_ends = [match.end() for match in _SENTENCE_END.finditer(self.text, begin, line_end)]
        cuts = [begin]
        while True:
            at = int(np.searchsorted(self.offsets[:, 1], cuts[-1], side="right"))
            soon, last = (self._begin_of(at + most, end) for most in (_SENTENCES_TOKENS, _MOST_PIECE_TOKENS))
            if soon >= end:
                break
            fitting = sentence_ends[bisect(sentence_ends, cuts[-1]) : bisect(sentence_ends, last)]
            if fitting:
                cuts.append(fitting[max(bisect(fitting, soon), 1) - 1])
            elif last >= end:
                break
            else:
                last = max(last, cuts[-1] + 1)  # tokens may share a character
                space = self.text.rfind(" ", cuts[-1] + 1, last)
                cuts.append(space if space > 0 else last)
        return list(itertools.pairwise([*cuts, end]))

    def _begin_of(self, token: int, end: int) -> int:
        """The character that a token begins with, or the end of the line that it is behind."""
        return min(int(self.offsets[token, 0]), end) if token < len(self.offsets) else end


@dataclass(frozen=True)
class Question:
    """What a policy may know beside the memory.

    Attributes:
        query: What is asked.
        answer: The right answer, or several that are all needed, for the policy `answer`: evaluation knows it.
        encode: Latents of texts, for the policy `latents`: [n, D] arrays, one a text; None where no encoder is at hand.
    """

    query: str
    answer: str | tuple[str, ...] = ""
    encode: Callable[[Sequence[MemoryText]], list[np.ndarray]] | None = None


def select(memories: Sequence[MemoryText], question: Question, expansion: Expansion) -> list[list[CharRange]]:
    """Choose what stays text.

    Args:
        memories: The spans of one prompt.
        question: What to select by; the expansion's own query wins.
        expansion: Policy and budget.

    Returns:
        For each span half-open ranges of its characters, ascending, not touching each other. Together they have at
        most as many encoder tokens as the budget. Empty where nothing fits, or the policy wants nothing.

    Raises:
        PromptError: There is nothing to select by.
    """
    if expansion.is_off:
        return [[] for _ in memories]
    policy = POLICIES[expansion.policy]
    query = question.query if expansion.query is None else expansion.query
    if policy.reads_query and not query.strip():
        raise PromptError(
            "the prompt asks nothing outside its memory: say with --expand-query what to select by, or choose "
            "--expand-policy random or all"
        )
    scores = policy.score(memories, Question(query, question.answer, question.encode))
    return _best(memories, scores, expansion.budget(sum(len(memory.offsets) for memory in memories)))


def _best(memories: Sequence[MemoryText], scores: np.ndarray, budget: int) -> list[list[CharRange]]:
    """The pieces with the best scores that fit together, earlier ones first among equals; none without a score."""
    places = [(span, piece) for span, memory in enumerate(memories) for piece in range(len(memory.pieces))]
    taken: list[list[int]] = [[] for _ in memories]
    # A token that pieces share, as a line end with the next line's indent, is counted once.
    counted = [bytearray(len(memory.offsets)) for memory in memories]
    for at in np.argsort(-scores, kind="stable").tolist():
        if scores[at] <= 0 or budget <= 0:
            break
        span, piece = places[at]
        memory = memories[span]
        first, stop = memory.piece_tokens[piece]
        cost = counted[span].count(0, first, stop)
        if cost > budget or piece in memory.barred_pieces:
            continue
        counted[span][first:stop] = b"\1" * (stop - first)
        taken[span].append(piece)
        budget -= cost
    return [_joined(memory.pieces[piece] for piece in sorted(own)) for memory, own in zip(memories, taken, strict=True)]


def _joined(ranges: Any) -> list[CharRange]:
    """Ranges that touch as one."""
    joined: list[CharRange] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
