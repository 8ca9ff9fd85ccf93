"""Spans cut into windows: what the encoder sees at once, and how many of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from utils.model.config import CompressionConfig
from utils.model.prompt import TokenIds, num_latents


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What the encoder sees at once: a core that is pooled, and context that is only read.

    Attributes:
        left: Encoder tokens before the core.
        core: The tokens that become latents.
        right: Encoder tokens after the core.
        chunk_size: Tokens of the core per latent.
        also: Further chunk sizes at which the same states are pooled; their latents follow, one size after another.
    """

    left: TokenIds
    core: TokenIds
    right: TokenIds
    chunk_size: int
    also: tuple[int, ...] = ()

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """All sizes at which it is pooled."""
        return (self.chunk_size, *self.also)

    @property
    def num_latents(self) -> int:
        """Vectors that this window gives, at all its chunk sizes."""
        return sum(self.latents_by_size)

    @property
    def latents_by_size(self) -> list[int]:
        """Vectors that it gives at each of its chunk sizes."""
        return [num_latents(len(self.core), size) for size in self.chunk_sizes]

    @property
    def num_tokens(self) -> int:
        """Text tokens that the encoder reads for it."""
        return len(self.left) + len(self.core) + len(self.right)


def plan_windows(token_ids: TokenIds, config: CompressionConfig) -> list[Window]:
    """Cut one span into windows.

    Args:
        token_ids: Encoder tokens of the span, at least one.
        config: Window, overlap, mask and chunk size.
    """
    if len(token_ids) == 0:
        raise ValueError("a span has at least one token; the prompt parser refuses empty ones")
    size, reach = config.window, config.overlap
    return [
        Window(
            left=token_ids[max(0, at - reach) : at],
            core=token_ids[at : at + size],
            right=() if config.causal else token_ids[at + size : at + size + reach],
            chunk_size=config.chunk_size,
        )
        for at in range(0, len(token_ids), size)
    ]


def micro_batches(sizes: Sequence[tuple[int, int]], limit: int) -> Iterator[list[int]]:
    """Group what is encoded into passes of at most `limit` tokens; a longer one has a pass of its own.

    Args:
        sizes: Chunk size and tokens of each window, or of what is kept together.
        limit: Tokens of one pass.

    Yields:
        Indices. Equal chunk sizes stand side by side, for they share one pooling; then the longest first: they fill
        whole passes of one shape, and memory that does not suffice shows at once.
    """
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i][0], -sizes[i][1])):
        if batch and tokens + sizes[i][1] > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += sizes[i][1]
    if batch:
        yield batch
