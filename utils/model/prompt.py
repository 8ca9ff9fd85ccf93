"""Prompts with memory: text with markers → decoder ids in which each memory span is a run of placeholders.

    prompt = parse_raw_prompt("Explain <|memory_start|>def f(): return 1<|memory_end|>", tokenizers, chunk_size=4)
    prompt.input_ids       # … start, placeholder × num_latents, end …
    prompt.spans[0].text   # "def f(): return 1"

The markers are found by one pass over the text as written; a span never reaches the decoder tokenizer or the chat
template, which see a single placeholder in its place. This module knows no torch and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.errors import ConfigError, PromptError, first_line
from utils.model.markers import MARKERS, MEMORY, MEMORY_END, MEMORY_START, PLACEHOLDER, MarkerIds

_MARKER = re.compile("|".join(re.escape(marker) for marker in MARKERS))
_EXCERPT = 40
# Characters that are searched for markers in one go, in which Python runs nothing else.
_STRETCH = 1 << 20
_LONGEST_MARKER = max(map(len, MARKERS))
# Tokens of a text: a list where they come from a tokenizer, an array where they come from a file.
TokenIds = Sequence[int] | np.ndarray


def num_latents(num_tokens: int, chunk_size: int) -> int:
    """Latents that stand for `num_tokens` encoder tokens: one a chunk, the last chunk may be short."""
    if num_tokens < 1 or chunk_size < 1:
        raise ValueError(f"num_tokens and chunk_size must be at least 1, got {num_tokens} and {chunk_size}")
    return -(-num_tokens // chunk_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpan:
    """One compressed stretch of a prompt.

    Attributes:
        text: What stood between the markers.
        token_ids: Its encoder tokens, without special tokens.
        start: First placeholder in the prompt's decoder ids.
        stop: One past the last placeholder.
        chunk_size: Encoder tokens per latent in this span.
        truncated_tokens: Encoder tokens left out at the end because the caller asked for truncation.
    """

    text: str
    token_ids: TokenIds
    start: int
    stop: int
    chunk_size: int
    truncated_tokens: int = 0

    @property
    def num_latents(self) -> int:
        """Rows of the prompt that this span takes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrompt:
    """Decoder ids with placeholders, and the spans behind them, in order."""

    input_ids: list[int]
    spans: tuple[MemorySpan, ...]

    @property
    def memory_tokens(self) -> int:
        """Encoder tokens in all spans."""
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def num_latents(self) -> int:
        """Placeholders in all spans."""
        return sum(span.num_latents for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokenizers:
    """The two tokenizers that a prompt meets, and the decoder's marker ids.

    Attributes:
        decoder: Hugging Face tokenizer of the decoder, with the marker tokens.
        encoder: Hugging Face tokenizer of the encoder.
        markers: Looked up once; a missing marker is a `CheckpointError` here, before any prompt is read.
    """

    decoder: Any
    encoder: Any
    markers: MarkerIds = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "markers", MarkerIds.from_tokenizer(self.decoder))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """How long one span may be.

    Attributes:
        max_tokens: Most encoder tokens of a span; None for no limit.
        truncate: Keep the first `max_tokens` of a longer span and report it, where otherwise it is an error.

    Raises:
        ConfigError: A limit below one token.
    """

    max_tokens: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-memory-tokens must be at least 1, got {self.max_tokens}")


def parse_raw_prompt(
    text: str, tokenizers: PromptTokenizers, chunk_size: int | Sequence[int] | None, limit: MemoryLimit | None = None
) -> MemoryPrompt:
    """Parse a prompt that is one text, as a base model reads it (the tokenizer's own special tokens are added).

    Args:
        text: The prompt with 0..n marked spans.
        tokenizers: Decoder and encoder tokenizer.
        chunk_size: Encoder tokens per latent, one for all spans or one a span; None leaves each span one placeholder.
        limit: Longest allowed span; no limit by default.

    Raises:
        PromptError: Unpaired, nested or empty spans, a literal placeholder, a span over the limit.
    """
    pieces = list(split_spans(text, "the prompt"))
    shortened = _join_with_placeholders(pieces)
    ids = tokenizers.decoder(shortened, add_special_tokens=True)["input_ids"]
    return _assemble(ids, _memories(pieces), tokenizers, chunk_size, limit)


def parse_chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizers: PromptTokenizers,
    chunk_size: int | Sequence[int] | None,
    limit: MemoryLimit | None = None,
    **template_arguments: Any,
) -> MemoryPrompt:
    """Parse a chat; the decoder's template is applied with the generation prompt and adds all special tokens.

    Args:
        messages: `{"role": …, "content": …}` in order; memory may stand in any content.
        tokenizers: Decoder and encoder tokenizer.
        chunk_size: Encoder tokens per latent, one for all spans or one a span; None leaves each span one placeholder.
        limit: Longest allowed span; no limit by default.
        template_arguments: Passed to the template, for example `enable_thinking=False`.

    Raises:
        PromptError: As `parse_raw_prompt`; also a message of another shape, markers in a role, a decoder without a
            chat template, a template that drops or repeats a span.
    """
    if not messages:
        raise PromptError("the chat has no messages: give at least one {'role': 'user', 'content': …}")
    shortened: list[dict[str, Any]] = []
    memories: list[str] = []
    for number, message in enumerate(messages):
        role, content = _role_and_content(message, number)
        pieces = list(split_spans(content, f"message {number}"))
        memories += _memories(pieces)
        shortened.append({**message, "role": role, "content": _join_with_placeholders(pieces)})
    ids = chat_token_ids(shortened, tokenizers.decoder, **template_arguments)
    return _assemble(ids, memories, tokenizers, chunk_size, limit)


def chat_token_ids(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **template_arguments: Any) -> list[int]:
    """Ids of a chat as the decoder reads it: its template with the generation prompt, and no further special tokens.

    Raises:
        PromptError: The tokenizer has no chat template, or the template refuses the messages.
    """
    text = chat_text(messages, tokenizer, **template_arguments)
    # The template wrote the special tokens; adding them again would put a second BOS in front.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **template_arguments: Any) -> str:
    """The text of a chat from which `chat_token_ids` makes ids.

    Raises:
        PromptError: As `chat_token_ids`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the decoder tokenizer has no chat template: use the raw-text command instead")
    arguments = {"add_generation_prompt": True, **template_arguments, "tokenize": False}
    return _apply_template(tokenizer, [dict(message) for message in messages], arguments)


def _apply_template(tokenizer: Any, messages: list[dict[str, Any]], arguments: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **arguments)
    except Exception as error:
        # A template is a program that came with the checkpoint: it may fail in any way.
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        message = first_line(error)[:200]
        raise PromptError(f"the decoder's chat template refuses these messages: {name}{message}") from None


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text as written: plain, or the inside of a memory span."""

    text: str
    is_memory: bool


def split_spans(text: str, where: str) -> Iterator[Piece]:
    """Cut a text into plain pieces and memory pieces, checking the markers' order on the way.

    Plain and memory pieces take turns; the first and the last are plain and may be empty.

    Args:
        text: As written, with markers.
        where: What the text is, for error messages.

    Raises:
        PromptError: Unpaired, nested or empty spans, a literal placeholder.
    """
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


def _memories(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.is_memory]


def _join_with_placeholders(pieces: Sequence[Piece]) -> str:
    return "".join(PLACEHOLDER if piece.is_memory else piece.text for piece in pieces)


def _role_and_content(message: Mapping[str, Any], number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise PromptError(f"message {number}: expected an object with role and content, got {type(message).__name__}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise PromptError(f"message {number}: {key} must be a text, got {type(message.get(key)).__name__}")
    role = message["role"]
    if has_markers(role):
        raise PromptError(f"message {number}: the role holds a memory marker; memory belongs into the content")
    return role, message["content"]


def _assemble(
    ids: list[int],
    memories: Sequence[str],
    tokenizers: PromptTokenizers,
    chunk_size: int | Sequence[int] | None,
    limit: MemoryLimit | None,
) -> MemoryPrompt:
    """Tokenise the spans and place them."""
    texts = list(memories)
    token_ids = tokenizers.encoder(texts, add_special_tokens=False)["input_ids"] if texts else []
    return place_spans(ids, texts, token_ids, tokenizers.markers, chunk_size, limit)


def place_spans(
    ids: list[int],
    texts: Sequence[str],
    token_ids: Sequence[TokenIds],
    marks: MarkerIds,
    chunk_size: int | Sequence[int] | None,
    limit: MemoryLimit | None = None,
) -> MemoryPrompt:
    """Widen each single placeholder to its span's number of latents, and note where the spans come to lie.

    Args:
        ids: Decoder ids with one placeholder between markers for each span.
        texts: The spans' texts.
        token_ids: Their encoder tokens.
        marks: The decoder's marker ids.
        chunk_size: Encoder tokens per latent, one for all spans or one a span; None leaves each span one placeholder.
        limit: Longest allowed span; no limit by default.

    Raises:
        PromptError: Another number of placeholders than spans, an empty span, a span over the limit.
    """
    places = [index for index, token in enumerate(ids) if token == marks.memory]
    intact = all(ids[at - 1] == marks.start and ids[at + 1 : at + 2] == [marks.end] for at in places)
    if len(places) != len(texts) or not intact:
        raise PromptError(
            f"the prompt has {len(texts)} memory spans but {len(places)} came out of the decoder's chat template "
            "and tokenizer; use a template that writes each message's content once and unchanged"
        )
    limited = [_apply_limit(tokens, limit, number) for number, tokens in enumerate(token_ids)]
    for number, (text, (kept, _)) in enumerate(zip(texts, limited, strict=True)):
        if len(kept) == 0:
            raise PromptError(f"memory span {number} ({text[:_EXCERPT]!r}) has no encoder tokens; fill it or remove it")
    sizes = [len(kept) for kept, _ in limited] if chunk_size is None else _sizes_per_span(chunk_size, len(texts))
    counts = [num_latents(len(kept), size) for (kept, _), size in zip(limited, sizes, strict=True)]
    widened, begins = widen(ids, counts, marks.memory)
    spans = [
        MemorySpan(
            text=text, token_ids=kept, start=int(begins[at]), stop=int(begins[at + 1]), chunk_size=size,
            truncated_tokens=cut,
        )
        for at, text, (kept, cut), size in zip(places, texts, limited, sizes, strict=True)
    ]  # fmt: skip
    return MemoryPrompt(input_ids=widened.tolist(), spans=tuple(spans))


def widen(ids: TokenIds, counts: Sequence[int], placeholder: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeat each placeholder once a latent.

    Placeholders are special tokens: one, or a run of them, leaves the ids around them the same.

    Args:
        ids: [T] decoder ids with one placeholder a span.
        counts: Latents of each span.
        placeholder: Its id.

    Returns:
        The wider ids, and where each of the given ones begins in them, [T + 1]: an id's rows end where the next begins.
    """
    narrow = np.asarray(ids)
    repeats = np.ones(len(narrow), dtype=np.int64)
    repeats[narrow == placeholder] = counts
    return np.repeat(narrow, repeats), np.concatenate([[0], np.cumsum(repeats)])


def _sizes_per_span(chunk_size: int | Sequence[int], num_spans: int) -> Sequence[int]:
    sizes = [chunk_size] * num_spans if isinstance(chunk_size, int) else list(chunk_size)
    if len(sizes) == 1:
        sizes *= num_spans
    if len(sizes) != num_spans:
        raise PromptError(f"{len(sizes)} chunk sizes for {num_spans} memory spans: give one, or one a span")
    for size in sizes:
        if size < 1:
            raise PromptError(f"chunk size must be at least 1, got {size}")
    return sizes


def _apply_limit(tokens: TokenIds, limit: MemoryLimit | None, number: int) -> tuple[TokenIds, int]:
    if limit is None or limit.max_tokens is None or len(tokens) <= limit.max_tokens:
        return tokens, 0
    if not limit.truncate:
        raise PromptError(
            f"memory span {number} has {len(tokens)} encoder tokens, more than the limit of {limit.max_tokens}: raise "
            "--max-memory-tokens, shorten the span, or pass --truncate-memory to keep its beginning"
        )
    return tokens[: limit.max_tokens], len(tokens) - limit.max_tokens
