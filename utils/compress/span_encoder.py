"""Memory spans to latents on the CPU, through the latent cache: what compressing and generating share.

    encoder = SpanEncoder(memory_encoder, files.fingerprint, cache)
    latents, cached_tokens = encoder.encode([span])[0]

Without a cache every span is encoded. Shape legend: n latents of a span, D decoder width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch

from utils.compress.latent_cache import LatentCache, window_key
from utils.model.code_llava_model import MemoryEncoder, MemoryUnit
from utils.model.join import join_rows
from utils.model.prompt import MemorySpan


class EncodingStopped(Exception):
    """No one waits for the result any more; what was encoded until then is in the cache."""


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
    def encode(
        self, spans: Sequence[MemorySpan], salts: Sequence[bytes] = (), stopped: Callable[[], bool] | None = None
    ) -> list[tuple[torch.Tensor, int]]:
        """Latents of spans.

        Args:
            spans: What to encode.
            salts: Whose each span is, at most 64 bytes; empty for everybody. What was stored under one salt is found
                under no other; what was stored without one is found by all.
            stopped: Asked before each micro-batch; True ends the work.

        Returns:
            Latents [n, D] of each span on the CPU, and how many of its tokens came from the cache.

        Raises:
            EncodingStopped: `stopped` said so.
        """
        units_of_spans = [self.memory_encoder.units(span) for span in spans]
        units = [unit for span_units in units_of_spans for unit in span_units]
        salt_of_units = [
            salt for salt, own in zip(salts or [b""] * len(spans), units_of_spans, strict=True) for _ in own
        ]
        # Equal units of one salt are encoded once: equal text gives equal bits. Of several salts each has its own, so
        # that not even the time tells one owner what another has sent.
        keys_of_units = [_salted(self._key(unit), salt) for unit, salt in zip(units, salt_of_units, strict=True)]
        unit_of_key = dict(zip(keys_of_units, units, strict=True))
        latents = self._look_up(unit_of_key, salted=any(salts))
        cached = set(latents)
        missing = [key for key in unit_of_key if key not in latents]
        whole: list[torch.Tensor] = []
        for group in self._groups([unit_of_key[key] for key in missing]) if stopped else [range(len(missing))]:
            if stopped and stopped():
                raise EncodingStopped
            if not group:
                continue
            keys = [missing[i] for i in group]
            new_units = [unit_of_key[key] for key in keys]
            fresh = self.memory_encoder.encode_units(new_units, to_cpu=True)
            parts = fresh.split([unit.num_latents for unit in new_units])
            if self.cache:
                self.cache.put_many(keys, parts)
            latents |= zip(keys, parts, strict=True)
            if keys == keys_of_units:
                # All is new and in its order: cut, not joined, so that a long span's latents are held once.
                whole = list(fresh.split([sum(unit.num_latents for unit in own) for own in units_of_spans]))
        results = []
        remaining = iter(keys_of_units)
        for number, span_units in enumerate(units_of_spans):
            here = [next(remaining) for _ in span_units]
            cached_tokens = sum(u.num_tokens for u, key in zip(span_units, here, strict=True) if key in cached)
            rows = whole[number] if whole else join_rows([latents[key] for key in here])
            results.append((rows, cached_tokens))
        return results

    def _look_up(self, unit_of_key: dict[bytes, MemoryUnit], *, salted: bool) -> dict[bytes, torch.Tensor]:
        """What the cache has, under the keys themselves or, for salted keys, without the salt."""
        if not self.cache:
            return {}
        keys = list(unit_of_key)
        found = self.cache.get_many(keys)
        latents = {key: known for key, known in zip(keys, found, strict=True) if known is not None}
        if salted:
            keys = [key for key in keys if key not in latents]
            found = self.cache.get_many([self._key(unit_of_key[key]) for key in keys])
            latents |= {key: known for key, known in zip(keys, found, strict=True) if known is not None}
        return latents

    def _groups(self, units: Sequence[MemoryUnit]) -> Iterator[Sequence[int]]:
        """Indices of the units of each micro-batch, in the order in which the chunker itself would take them."""
        sizes = [sum(window.num_tokens for window in unit.windows) for unit in units]
        order = sorted(range(len(units)), key=lambda i: (units[i].windows[0].chunk_size, -sizes[i]))
        group: list[int] = []
        num_tokens = 0
        for i in order:
            if group and num_tokens + sizes[i] > self.memory_encoder.chunker.pass_tokens:
                yield group
                group, num_tokens = [], 0
            group.append(i)
            num_tokens += sizes[i]
        if group:
            yield group

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


def _salted(key: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(key, key=salt, digest_size=len(key)).digest() if salt else key
