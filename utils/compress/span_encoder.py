"""Memory spans to latents on the CPU, through the latent cache: what compressing and generating share.

    encoder = SpanEncoder(memory_encoder, files.fingerprint, cache)
    latents, cached_tokens = encoder.encode([span])[0]

Without a cache every span is encoded. Shape legend: n latents of a span, D decoder width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch

from utils.compress.latent_cache import LatentCache, window_key
from utils.model.code_llava_model import MemoryEncoder, MemoryUnit
from utils.model.prompt import MemorySpan
from utils.model.windows import micro_batches


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
        self._dtype = memory_encoder.chunker.encoder.dtype

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
        # Equal units of one salt are encoded once: equal text gives equal bits. Of several salts each has its own, so
        # that not even the time tells one owner what another has sent.
        keys_of_spans = [
            [_salted(self._key(unit), salt) for unit in units]
            for units, salt in zip(units_of_spans, salts or [b""] * len(spans), strict=True)
        ]
        keys_of_units = [*chain(*keys_of_spans)]
        unit_of_key = dict(zip(keys_of_units, chain(*units_of_spans), strict=True))
        latents = self._look_up(unit_of_key, salted=any(salts))
        cached = set(latents)
        missing = [key for key in unit_of_key if key not in latents]
        groups: Iterable[Sequence[int]] = [range(len(missing))] if missing else []
        if stopped:
            windows_of = [unit_of_key[key].windows for key in missing]
            sizes = [(windows[0].chunk_size, sum(window.num_tokens for window in windows)) for windows in windows_of]
            groups = micro_batches(sizes, self.memory_encoder.chunker.pass_tokens)
        whole: list[torch.Tensor] = []
        for group in groups:
            if stopped and stopped():
                raise EncodingStopped
            keys = [missing[i] for i in group]
            units = [unit_of_key[key] for key in keys]
            fresh = self.memory_encoder.encode_units(units, to_cpu=True)
            parts = fresh.split([unit.num_latents for unit in units])
            if self.cache:
                self.cache.put_many(keys, parts)
            latents |= zip(keys, parts, strict=True)
            if keys == keys_of_units:
                # All is new and in its order: cut, not joined, so that a long span's latents are held once.
                whole = list(fresh.split([sum(unit.num_latents for unit in own) for own in units_of_spans]))
        results = []
        for number, (units, keys) in enumerate(zip(units_of_spans, keys_of_spans, strict=True)):
            cached_tokens = sum(unit.num_tokens for unit, key in zip(units, keys, strict=True) if key in cached)
            rows = whole[number] if whole else torch.cat([latents[key] for key in keys])
            results.append((rows, cached_tokens))
        return results

    def _look_up(self, unit_of_key: dict[bytes, MemoryUnit], *, salted: bool) -> dict[bytes, torch.Tensor]:
        """What the cache has, under the keys themselves or, for salted keys, without the salt."""
        latents: dict[bytes, torch.Tensor] = {}
        if not self.cache:
            return latents
        for with_salt in (True, False) if salted else (True,):
            keys = [key for key in unit_of_key if key not in latents]
            found = self.cache.get_many([key if with_salt else self._key(unit_of_key[key]) for key in keys])
            latents |= {key: known for key, known in zip(keys, found, strict=True) if known is not None}
        return latents

    def _key(self, unit: MemoryUnit) -> bytes:
        first, last = unit.windows[0], unit.windows[-1]
        core = first.core if len(unit.windows) == 1 else [token for window in unit.windows for token in window.core]
        # Everything but the tokens that decides a latent's bits.
        namespace = f"{self._fingerprint} {first.chunk_size} {self._dtype}".encode()
        return window_key(namespace, first.left, core, last.right)


def _salted(key: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(key, key=salt, digest_size=len(key)).digest() if salt else key
