"""Generation and RULER's local backend through the latent cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from utils.compress.latent_cache import LatentCache, window_key
from utils.compress.span_encoder import EncodingStopped, SpanEncoder
from utils.inference.inference import load_model
from utils.model.code_llava_model import MemoryUnit
from utils.model.prompt import MemorySpan

PROMPT = "Say <|memory_start|>def f(): return 1<|memory_end|> and <|memory_start|>class A: pass<|memory_end|>"


def test_generation_takes_latents_from_the_cache(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32")
    prompt = processor.parse_raw(PROMPT)
    expected = plain.generate([prompt], max_new_tokens=6)
    with LatentCache.open(tmp_path / "cache") as cache:
        model, _, _ = load_model(checkpoints["lclm"], "cpu", dtype="float32", cache=cache)
        assert model.generate([prompt], max_new_tokens=6) == expected
        with mock.patch.object(model.memory_encoder, "encode_units") as encode:
            assert model.generate([prompt], max_new_tokens=6) == expected
        encode.assert_not_called()


def test_gradients_never_come_from_the_cache(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with LatentCache.open(tmp_path / "cache") as cache:
        model, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32", cache=cache)
        spans = processor.parse_raw(PROMPT).spans
        with torch.inference_mode():
            model.encode_memory(spans)
        assert all(latents.requires_grad for latents in model.encode_memory(spans))


def test_equal_spans_are_encoded_once(checkpoints: dict[str, Path]) -> None:
    model, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32")
    span = "<|memory_start|>def f(): return 1<|memory_end|>"
    spans = processor.parse_raw(span + span).spans
    with mock.patch.object(
        model.memory_encoder, "encode_units", side_effect=model.memory_encoder.encode_units
    ) as encode:
        first, second = SpanEncoder(model.memory_encoder)(spans)
    assert torch.equal(first, second)
    assert len(encode.call_args.args[0]) == len(model.memory_encoder.units(spans[0]))


def test_the_latents_of_a_long_span_are_held_once(checkpoints: dict[str, Path]) -> None:
    model, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32")
    made: list[torch.Tensor] = []
    encode_units = model.memory_encoder.encode_units

    def noting(units: Sequence[MemoryUnit], **settings: Any) -> torch.Tensor:
        made.append(encode_units(units, **settings))
        return made[-1]

    text = " ".join(f"x{number} = {number}" for number in range(50))
    (span,) = processor.parse_raw(f"<|memory_start|>{text}<|memory_end|>").spans
    assert len(model.memory_encoder.units(span)) > 1
    with mock.patch.object(model.memory_encoder, "encode_units", noting):
        (latents,) = SpanEncoder(model.memory_encoder)([span])
    assert latents.data_ptr() == made[0].data_ptr()
    assert latents.nbytes == made[0].untyped_storage().nbytes()


def cached(encoder: SpanEncoder, spans: Sequence[MemorySpan], *salts: bytes) -> list[int]:
    return [count for _, count in encoder.encode(spans, salts)]


def test_salts_keep_entries_apart(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with LatentCache.open(tmp_path / "cache") as cache:
        model, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32", cache=cache)
        encoder = SpanEncoder(model.memory_encoder, "weights", cache)
        one, two = processor.parse_raw(PROMPT).spans
        sizes = [len(one.token_ids), len(two.token_ids)]
        # Equal spans of two owners in one batch: neither learns of the other's.
        assert cached(encoder, [one, one], b"a", b"b") == [0, 0]
        assert cached(encoder, [one, one, two], b"a", b"b", b"c") == [sizes[0], sizes[0], 0]
        assert cached(encoder, [one], b"c") == cached(encoder, [one]) == [0]
        # What has no salt is everybody's.
        assert cached(encoder, [one], b"d") == [sizes[0]]
        plain, salted = (encoder.encode([two], salts)[0][0] for salts in ([], [b"c"]))
        assert torch.equal(plain, salted)


def test_keys_without_a_salt_are_what_they_were(checkpoints: dict[str, Path]) -> None:
    model, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32")
    seen: list[bytes] = []
    cache = mock.Mock()
    cache.get_many.side_effect = lambda keys: seen.extend(keys) or [None] * len(keys)
    span = processor.parse_raw(PROMPT).spans[0]
    SpanEncoder(model.memory_encoder, "weights", cache).encode([span])
    first = model.memory_encoder.units(span)[0].windows[0]
    assert seen[0] == window_key(b"weights 4 torch.float32", first.left, first.core, first.right)


def test_a_stopped_encoding_keeps_what_it_has(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with LatentCache.open(tmp_path / "cache") as cache:
        model, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32")
        window = model.config.window
        model.memory_encoder.chunker.batch_tokens = 2 * window
        encoder = SpanEncoder(model.memory_encoder, "weights", cache)
        text = "".join(chr(97 + number) * window for number in range(8))
        spans = processor.parse_raw(f"<|memory_start|>{text}<|memory_end|>").spans
        whole = SpanEncoder(model.memory_encoder).encode(spans)[0][0]
        asked: list[int] = []
        with pytest.raises(EncodingStopped):
            encoder.encode(spans, stopped=lambda: asked.append(1) or len(asked) > 2)  # type: ignore[func-returns-value]
        latents, cached_tokens = encoder.encode(spans, stopped=lambda: False)[0]
        assert cached_tokens == 4 * window
        assert torch.equal(latents, whole)
