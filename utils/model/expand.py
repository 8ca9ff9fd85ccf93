"""A prompt in which parts of the memory are text: the latents of the chunks inside them are left out.

    offsets = token_offsets(tokenizers.encoder, span.text, len(span.token_ids))
    prompt = expand(prompt, [[(120, 180)]], [offsets], tokenizers)       # characters 120 to 180 of the only span

    start L L L text text text L L end

A chunk that is only partly inside such a range keeps its latent, so that nothing of the memory is missing: the text
before the range in the latent before it, the text behind it in the one behind. The span is encoded as ever, whole.
Which ranges is decided by `utils.compress.select`. This module knows no torch and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from utils.errors import ConfigError
from utils.model.prompt import MemoryPrompt, MemorySpan, PromptTokenizers, TextSegment

CharRange = tuple[int, int]


def token_offsets(tokenizer: Any, text: str, num_tokens: int) -> np.ndarray:
    """Which characters each token stands for.

    Args:
        tokenizer: Hugging Face tokenizer of the encoder.
        text: A span's text.
        num_tokens: Tokens that are wanted, from the first; fewer than there are if the span was truncated.

    Returns:
        [N, 2] half-open ranges of characters. Tokens of one character have one range.

    Raises:
        ConfigError: The tokenizer cannot tell.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for: showing memory as text "
            "needs an encoder with a fast tokenizer (tokenizer.json)"
        )
    # As `memory_ids` reads it; the tokenizer sets it anew at each call of its own.
    backend.encode_special_tokens = True
    offsets = backend.encode(text, add_special_tokens=False).offsets
    return np.array(offsets, dtype=np.int64).reshape(-1, 2)[:num_tokens]


def expand(
    prompt: MemoryPrompt,
    chosen: Sequence[Sequence[CharRange]],
    offsets: Sequence[np.ndarray],
    tokenizers: PromptTokenizers,
) -> MemoryPrompt:
    """Show parts of the memory as text.

    Args:
        prompt: Parsed, all latents.
        chosen: For each span half-open ranges of its characters, ascending and disjoint.
        offsets: For each span what `token_offsets` says; not looked at where nothing is chosen.
        tokenizers: Of the checkpoint.

    Returns:
        The wider or narrower prompt; the same where nothing is chosen.
    """
    if not any(chosen):
        return prompt
    ids: list[int] = []
    spans: list[MemorySpan] = []
    taken = 0
    for span, ranges, own in zip(prompt.spans, chosen, offsets, strict=True):
        ids += prompt.input_ids[taken : span.start]
        spans.append(_expand_span(span, ranges, own, tokenizers, ids))
        taken = span.stop
    ids += prompt.input_ids[taken:]
    return replace(prompt, input_ids=ids, spans=tuple(spans))


def tokens_inside(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """The tokens wholly inside a half-open range of characters, as a half-open range; it may be empty."""
    first, stop = np.searchsorted(offsets[:, 0], begin), np.searchsorted(offsets[:, 1], end, side="right")
    return int(first), max(int(first), int(stop))


def inner_chunks(tokens: tuple[int, int], num_tokens: int, chunk_size: int) -> tuple[int, int]:
    """The chunks wholly inside a half-open range of a span's tokens, as a half-open range; it may be empty.

    Args:
        tokens: First token, one past the last.
        num_tokens: Tokens of the whole span, whose last chunk may be short.
        chunk_size: Tokens of a chunk.
    """
    first = -(-tokens[0] // chunk_size)
    stop = -(-num_tokens // chunk_size) if tokens[1] == num_tokens else tokens[1] // chunk_size
    return first, max(first, stop)


def _expand_span(
    span: MemorySpan, ranges: Sequence[CharRange], offsets: np.ndarray, tokenizers: PromptTokenizers, ids: list[int]
) -> MemorySpan:
    """The span with its new place; its ids are put behind those before it."""
    segments: list[TextSegment] = []
    start, chunk = len(ids), 0
    placeholder = tokenizers.markers.memory
    for chars, chunks in _without_latents_between(span, ranges, offsets):
        ids += [placeholder] * (chunks[0] - chunk)
        begin = len(ids)
        # In one go: what stands side by side is read as one text, here as by a server that gets text.
        shown = "".join(span.text[a:b] for a, b in chars)
        ids += tokenizers.decoder(shown, add_special_tokens=False)["input_ids"]
        segments.append(TextSegment(chars=tuple(chars), rows=(begin, len(ids)), chunks=chunks))
        chunk = chunks[1]
    ids += [placeholder] * (span.num_chunks - chunk)
    return replace(span, start=start, stop=len(ids), segments=tuple(segments))


def _without_latents_between(
    span: MemorySpan, ranges: Sequence[CharRange], offsets: np.ndarray
) -> list[tuple[list[CharRange], tuple[int, int]]]:
    """Ranges in groups, each with the chunks inside it: between two groups there is at least one latent."""
    groups: list[tuple[list[CharRange], tuple[int, int]]] = []
    for begin, end in ranges:
        first, stop = inner_chunks(tokens_inside(offsets, begin, end), len(span.token_ids), span.chunk_size)
        if groups and groups[-1][1][1] >= first:
            chars, chunks = groups[-1]
            groups[-1] = ([*chars, (begin, end)], (chunks[0], max(chunks[1], stop)))
        else:
            groups.append(([(begin, end)], (first, stop)))
    return groups
