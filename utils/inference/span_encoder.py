"""Memory spans to latents on the CPU, through the latent cache: what compressing and generating share.

    encoder = SpanEncoder(memory_encoder, files.fingerprint, cache)
    latents, cached_tokens = encoder.encode([span])[0]

Without a cache every span is encoded. Shape legend: n latents of a span, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.inference.latent_cache import LatentCache, window_key
from utils.model.code_llava_model import MemoryEncoder, MemoryUnit
from utils.model.prompt import MemorySpan
from utils.model.splice import join_rows


class SpanEncoder:
    """A memory encoder with a memory of its own.

    Args:
        memory_encoder: Encodes what is not cached.
        fingerprint: Of the weights and the compression that decide its latents.
        cache: Latents of earlier encodings; None to encode everything.
    """

    def __init__(self, memory_encoder: MemoryEncoder, fingerprint: str = "", cache: LatentCache | None = None) -> None:
        self.memory_encoder = memory_encoder
        self.cache = cache
        self._fingerprint = fingerprint
        self._namespaces: dict[int, bytes] = {}

    def __call__(self, spans: Sequence[MemorySpan]) -> list[torch.Tensor]:
        """Latents [n, D] of each span."""
        return [latents for latents, _ in self.encode(spans)]

    @torch.inference_mode()
    def encode(self, spans: Sequence[MemorySpan]) -> list[tuple[torch.Tensor, int]]:
        """Latents [n, D] of each span on the CPU, and how many of its tokens came from the cache."""
        units_of_spans = [self.memory_encoder.units(span) for span in spans]
        units = [unit for span_units in units_of_spans for unit in span_units]
        # Equal units, in one prompt or in many, are encoded once: equal text gives equal bits.
        keys_of_units = [self._key(unit) for unit in units]
        unit_of_key = dict(zip(keys_of_units, units, strict=True))
        keys = list(unit_of_key)
        found: list[torch.Tensor | None] = self.cache.get_many(keys) if self.cache else [None] * len(keys)
        latents = {key: known for key, known in zip(keys, found, strict=True) if known is not None}
        missing = [key for key in keys if key not in latents]
        fresh = self.memory_encoder.encode_units([unit_of_key[key] for key in missing], to_cpu=True)
        if self.cache and missing:
            self.cache.put_many(missing, fresh)
        cached = set(latents)
        latents |= zip(missing, fresh, strict=True)
        results = []
        remaining = iter(keys_of_units)
        for span_units in units_of_spans:
            here = [next(remaining) for _ in span_units]
            cached_tokens = sum(u.num_tokens for u, key in zip(span_units, here, strict=True) if key in cached)
            results.append((join_rows([latents[key] for key in here]), cached_tokens))
        return results

    def _key(self, unit: MemoryUnit) -> bytes:
        first, last = unit.windows[0], unit.windows[-1]
        core = first.core if len(unit.windows) == 1 else [token for window in unit.windows for token in window.core]
        return window_key(self._namespace(first.chunk_size), first.left, core, last.right)

    def _namespace(self, chunk_size: int) -> bytes:
        """Everything but the tokens that decides a latent's bits."""
        if chunk_size not in self._namespaces:
            dtype = self.memory_encoder.chunker.encoder.dtype
            self._namespaces[chunk_size] = f"{self._fingerprint} {chunk_size} {dtype}".encode()
        return self._namespaces[chunk_size]
