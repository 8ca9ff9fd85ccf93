"""Prompt embeddings as a value, as a file with its sidecar, and (for a server) as a wire blob.

    save_prompt_embeds("artifacts/prompt_embeddings.npy", embeds)   # + artifacts/prompt_embeddings.json
    embeds = load_prompt_embeds("artifacts/prompt_embeddings.npy")

Shape legend: T prompt rows, D decoder width. This module knows no model and no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionStats:
    """What a compression did, in counts.

    Attributes:
        memory_tokens: Encoder tokens inside the spans.
        num_latents: Latent rows that stand for them.
        prompt_tokens: Rows of the whole prompt, T.
        cached_tokens: Memory tokens whose latents came from the cache.
    """

    memory_tokens: int
    num_latents: int
    prompt_tokens: int
    cached_tokens: int = 0

    @property
    def ratio(self) -> float:
        """Compression ratio: memory tokens per latent (LCLM's sense; kvpress uses the word for the part removed)."""
        return self.memory_tokens / self.num_latents if self.num_latents else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmbeds:
    """The rows that a decoder reads in place of a prompt's token embeddings.

    Attributes:
        values_TD: Float tensor [T, D], on the CPU, in the checkpoint's dtype.
        spans: Half-open row ranges of the latents, markers excluded, in order.
        stats: Counts.
        provenance: Checkpoint fingerprint, chunk size, versions.
    """

    values_TD: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    stats: CompressionStats
    provenance: dict[str, Any] = field(default_factory=dict)
