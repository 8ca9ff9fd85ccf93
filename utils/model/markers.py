"""The three marker strings: how a text is cut at them, and how a tokenizer maps them to ids; their only home.

The prompt     "Explain <|memory_start|>def f(): …<|memory_end|>"
becomes        "Explain <|memory_start|><|memory|><|memory|><|memory_end|>"   one placeholder a latent
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from utils.errors import CheckpointError, PromptError

MEMORY_START = "<|memory_start|>"
MEMORY_END = "<|memory_end|>"
MEMORY = "<|memory|>"
MARKERS = (MEMORY_START, MEMORY_END, MEMORY)
# What a memory becomes before it is widened to one placeholder a latent.
PLACEHOLDER = MEMORY_START + MEMORY + MEMORY_END

_MARKER = re.compile("|".join(re.escape(marker) for marker in MARKERS))
_LONGEST_MARKER = max(map(len, MARKERS))
# Characters that are searched for markers in one go, in which Python runs nothing else.
_STRETCH = 1 << 20
_EXCERPT = 40


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text as written: plain, or the inside of a memory span."""

    text: str
    is_memory: bool


class Marked(str):
    """A text with memories whose bounds are known, so that a memory may hold anything: also the markers' own text.

    `+` keeps the bounds; whatever else makes a text of it (formatting, slicing, JSON) gives a plain one, in which the
    markers alone count.

    Attributes:
        pieces: As `split_spans` gives them.
    """

    pieces: tuple[Piece, ...]

    def __new__(cls, pieces: Iterable[Piece]) -> Marked:
        """The text of pieces in any order; neighbours that are plain become one."""
        joined = [Piece("", False)]
        for piece in pieces:
            if piece.is_memory:
                joined += [piece, Piece("", False)]
            else:
                joined[-1] = Piece(joined[-1].text + piece.text, False)
        made = super().__new__(cls, "".join(_as_written(piece) for piece in joined))
        made.pieces = tuple(joined)
        return made

    def __add__(self, other: str) -> Marked:
        return Marked([*self.pieces, *split_spans(other, "the prompt")])

    def __radd__(self, other: str) -> Marked:
        return Marked([*split_spans(other, "the prompt"), *self.pieces])

    def __reduce__(self) -> tuple[type[Marked], tuple[tuple[Piece, ...]]]:
        return Marked, (self.pieces,)


def wrap(memory: str) -> Marked:
    """A text as a prompt's memory, whatever it holds: between the markers."""
    return Marked([Piece(memory, True)])


def _as_written(piece: Piece) -> str:
    return f"{MEMORY_START}{piece.text}{MEMORY_END}" if piece.is_memory else piece.text


def split_spans(text: str, where: str) -> Iterator[Piece]:
    """Cut a text into plain pieces and memory pieces, checking the markers' order on the way.

    Plain and memory pieces take turns; the first and the last are plain and may be empty.

    Args:
        text: As written, with markers; or `Marked`.
        where: What the text is, for error messages.

    Raises:
        PromptError: Unpaired, nested or empty spans, a literal placeholder.
    """
    if isinstance(text, Marked):
        if Piece("", True) in text.pieces:
            raise PromptError(f"{where}: the memory span is empty; fill it or remove it")
        yield from text.pieces
        return
    position, opened = 0, None
    for match in _find_markers(text):
        marker, at = match.group(), match.start()
        if marker == MEMORY:
            raise PromptError(
                f"{_place(text, at, where)}: the text holds a literal {MEMORY}, which stands for a latent and cannot "
                "be typed; remove it or write it differently"
            )
        if marker == MEMORY_START:
            if opened is not None:
                raise PromptError(
                    f"{_place(text, at, where)}: {MEMORY_START} inside the span that begins at character {opened}; "
                    f"spans do not nest, close it with {MEMORY_END} first"
                )
            yield Piece(text[position:at], False)
            opened = at
        else:
            if opened is None:
                raise PromptError(f"{_place(text, at, where)}: {MEMORY_END} without a {MEMORY_START} before it")
            if at == position:
                raise PromptError(f"{_place(text, opened, where)}: the memory span is empty; fill it or remove it")
            yield Piece(text[position:at], True)
            opened = None
        position = match.end()
    if opened is not None:
        raise PromptError(f"{_place(text, opened, where)}: {MEMORY_START} without a {MEMORY_END} after it")
    yield Piece(text[position:], False)


def has_markers(text: str) -> bool:
    """Whether a text holds a marker, paired or not."""
    # A request may have a hundred thousand short texts.
    return bool(_MARKER.search(text) if len(text) <= _STRETCH else next(_find_markers(text), None))


def _find_markers(text: str) -> Iterator[re.Match[str]]:
    begin = 0
    while begin < len(text):
        end = begin + _STRETCH
        # A marker that begins in this stretch may end in the next.
        for match in _MARKER.finditer(text, begin, end + _LONGEST_MARKER - 1):
            yield match
            end = max(end, match.end())
        begin = end


def _place(text: str, at: int, where: str) -> str:
    excerpt = text[max(0, at - _EXCERPT // 2) : at + _EXCERPT]
    return f"{where}, character {at} ({excerpt!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkerIds:
    """Decoder token ids of the three markers."""

    start: int
    end: int
    memory: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> MarkerIds:
        """Look the markers up in a Hugging Face tokenizer.

        Raises:
            CheckpointError: A marker is not one token of this tokenizer.
        """
        start, end, memory = (_marker_id(tokenizer, marker) for marker in MARKERS)
        return cls(start=start, end=end, memory=memory)


def control_pattern(tokenizer: Any, *others: str, but: Collection[str] = ()) -> re.Pattern[str] | None:
    """What finds a tokenizer's control tokens, such as `<|im_end|>`, in a text, which would be obeyed there.

    Args:
        tokenizer: Hugging Face tokenizer.
        others: Further texts that are to be found.
        but: Control tokens that are not to be found.

    Returns:
        The pattern; None where there is nothing to find.
    """
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    wanted = [text for text in (*found, *others) if text not in but]
    # The longest first: of two that begin alike the tokenizer takes the longer one, too.
    return re.compile("|".join(map(re.escape, sorted(wanted, key=len, reverse=True)))) if wanted else None


def _marker_id(tokenizer: Any, marker: str) -> int:
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
        where = getattr(tokenizer, "name_or_path", "") or "the decoder tokenizer"
        raise CheckpointError(
            f"{where}: marker token {marker} is missing (expected one id, got {ids}): add the three markers "
            f"{', '.join(MARKERS)} as special tokens, or use the tokenizer that came with the checkpoint"
        )
    return int(ids[0])
