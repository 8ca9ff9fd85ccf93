"""Prompts with memory: text with markers → decoder ids in which each memory span is a run of placeholders.

    prompt = parse_raw_prompt("Explain <|memory_start|>def f(): return 1<|memory_end|>", tokenizers, chunk_size=4)
    prompt.input_ids       # … start, placeholder × num_latents, end …
    prompt.spans[0].text   # "def f(): return 1"

The markers are found by one pass over the text as written; a span never reaches the decoder tokenizer or the chat
template, which see a single placeholder in its place. This module knows no torch and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from utils.errors import ConfigError, PromptError
from utils.model.chat import chat_ids, chat_query
from utils.model.markers import PLACEHOLDER, MarkerIds, has_markers, split_spans

_EXCERPT = 40
# Tokens of a text: a list where they come from a tokenizer, an array where they come from a file.
TokenIds = Sequence[int] | np.ndarray


def num_latents(num_tokens: int, chunk_size: int) -> int:
    """Latents that stand for `num_tokens` encoder tokens: one a chunk, the last chunk may be short."""
    if num_tokens < 1 or chunk_size < 1:
        raise ValueError(f"num_tokens and chunk_size must be at least 1, got {num_tokens} and {chunk_size}")
    return -(-num_tokens // chunk_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSegment:
    """Part of a span that the decoder reads as text (`utils.model.expand`).

    Attributes:
        chars: Half-open ranges of the span's characters, in order; mostly one. Several have no latent between them.
        rows: Half-open range of the prompt's rows that hold their text.
        chunks: Half-open range of the span's chunks whose latents the text stands for; may be empty.
    """

    chars: tuple[tuple[int, int], ...]
    rows: tuple[int, int]
    chunks: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpan:
    """One compressed stretch of a prompt.

    Attributes:
        text: What stood between the markers.
        token_ids: Its encoder tokens, without special tokens.
        start: First of its rows in the prompt's decoder ids, after the opening marker.
        stop: One past the last.
        chunk_size: Encoder tokens per latent in this span.
        truncated_tokens: Encoder tokens left out at the end because the caller asked for truncation.
        segments: What is read as text; the other rows are placeholders of latents.
    """

    text: str
    token_ids: TokenIds
    start: int
    stop: int
    chunk_size: int
    truncated_tokens: int = 0
    segments: tuple[TextSegment, ...] = ()

    @property
    def num_chunks(self) -> int:
        """Latents that its encoder tokens give, shown or not."""
        return num_latents(len(self.token_ids), self.chunk_size)

    @property
    def text_rows(self) -> int:
        """Rows that hold text."""
        return sum(segment.rows[1] - segment.rows[0] for segment in self.segments)

    @property
    def num_latents(self) -> int:
        """Rows that hold latents."""
        return self.stop - self.start - self.text_rows

    @property
    def latent_runs(self) -> list[tuple[int, int, int]]:
        """Where its latents stand: first row, one past the last row, and the chunk that the first row stands for."""
        runs = []
        row, chunk = self.start, 0
        for segment in self.segments:
            runs.append((row, segment.rows[0], chunk))
            row, chunk = segment.rows[1], segment.chunks[1]
        return [run for run in [*runs, (row, self.stop, chunk)] if run[0] < run[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrompt:
    """Decoder ids with placeholders, and the spans behind them, in order.

    Attributes:
        input_ids: What the decoder reads; latents take the placeholders' rows.
        spans: The memory.
        query: What the prompt asks, for selecting by it: the last user message that says something outside its
            memory, or all text outside the memory of a prompt that is no chat.
    """

    input_ids: list[int]
    spans: tuple[MemorySpan, ...]
    query: str = ""

    @property
    def memory_tokens(self) -> int:
        """Encoder tokens in all spans."""
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def num_latents(self) -> int:
        """Placeholders in all spans."""
        return sum(span.num_latents for span in self.spans)

    @property
    def text_rows(self) -> int:
        """Rows of text in all spans."""
        return sum(span.text_rows for span in self.spans)


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
    text: str,
    tokenizers: PromptTokenizers,
    chunk_size: int | Sequence[int] | None,
    limit: MemoryLimit | None = None,
    *,
    add_special_tokens: bool = True,
) -> MemoryPrompt:
    """Parse a prompt that is one text, as a base model reads it.

    Args:
        text: The prompt with 0..n marked spans.
        tokenizers: Decoder and encoder tokenizer.
        chunk_size: Encoder tokens per latent, one for all spans or one a span; None leaves each span one placeholder.
        limit: Longest allowed span; no limit by default.
        add_special_tokens: The decoder tokenizer adds its own, a token of beginning only if the text brings none; False
            for a text that a chat template wrote.

    Raises:
        PromptError: Unpaired, nested or empty spans, a literal placeholder, a span over the limit.
    """
    shortened, memories = _shorten(text, "the prompt")
    ids = list(tokenizers.decoder(shortened, add_special_tokens=add_special_tokens)["input_ids"])
    if add_special_tokens:
        ids = with_one_beginning(ids, tokenizers.decoder)
    query = shortened.replace(PLACEHOLDER, " ").strip()
    return _assemble(ids, memories, query, tokenizers, chunk_size, limit)


def memory_ids(encoder: Any, texts: Sequence[str]) -> list[list[int]]:
    """Encoder tokens of memories, without special tokens: what looks like one is characters, as all of a memory is."""
    return encoder(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def with_one_beginning(ids: list[int], tokenizer: Any) -> list[int]:
    """Ids of a text to which the tokenizer added its special tokens, without the text's own token of beginning.

    A text brings one where a template wrote it, as RULER's for Llama 3.
    """
    beginning = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if beginning is not None and ids[:2] == [beginning, beginning] else ids


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
        text, own = _shorten(content, f"message {number}")
        memories += own
        shortened.append({**message, "role": role, "content": text})
    ids = chat_ids(shortened, tokenizers.decoder, **template_arguments)
    return _assemble(ids, memories, chat_query(shortened), tokenizers, chunk_size, limit)


def _shorten(text: str, where: str) -> tuple[str, list[str]]:
    """A text with one placeholder for each memory, and the memories."""
    _refuse_half_characters(text, where)
    pieces = list(split_spans(text, where))
    memories = [piece.text for piece in pieces if piece.is_memory]
    return "".join(PLACEHOLDER if piece.is_memory else piece.text for piece in pieces), memories


def _refuse_half_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} holds half a character (a lone surrogate, {text[error.start]!r}) at character {error.start}: "
            "write the whole character, or text that is UTF-8"
        ) from None


def _role_and_content(message: Mapping[str, Any], number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise PromptError(f"message {number}: expected an object with role and content, got {type(message).__name__}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise PromptError(f"message {number}: {key} must be a text, got {type(message.get(key)).__name__}")
    role = message["role"]
    _refuse_half_characters(role, f"message {number}: the role")
    if has_markers(role):
        raise PromptError(f"message {number}: the role holds a memory marker; memory belongs into the content")
    return role, message["content"]


def _assemble(
    ids: list[int],
    memories: list[str],
    query: str,
    tokenizers: PromptTokenizers,
    chunk_size: int | Sequence[int] | None,
    limit: MemoryLimit | None,
) -> MemoryPrompt:
    """Tokenise the spans and place them."""
    token_ids = memory_ids(tokenizers.encoder, memories) if memories else []
    return replace(place_spans(ids, memories, token_ids, tokenizers.markers, chunk_size, limit), query=query)


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
    most = limit.max_tokens if limit else None
    if most is None or len(tokens) <= most:
        return tokens, 0
    if limit and limit.truncate:
        return tokens[:most], len(tokens) - most
    raise PromptError(
        f"memory span {number} has {len(tokens)} encoder tokens, more than the limit of {most}: raise "
        "--max-memory-tokens, shorten the span, or pass --truncate-memory to keep its beginning"
    )
