"""Generation and RULER's local backend through the latent cache."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from utils.inference.inference import load_model
from utils.inference.latent_cache import LatentCache
from utils.inference.span_encoder import SpanEncoder

PROMPT = "Say <|memory_start|>def f(): return 1<|memory_end|> and <|memory_start|>class A: pass<|memory_end|>"


def test_generation_takes_latents_from_the_cache(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain, _, processor = load_model(checkpoints["lclm"], "cpu", dtype="float32")
    prompt = processor.parse_raw(PROMPT)
    expected = plain.generate([prompt], max_new_tokens=6)
    with LatentCache.open(tmp_path / "cache") as cache:
        model, _, _ = load_model(checkpoints["lclm"], "cpu", dtype="float32", cache=cache)
        assert model.generate([prompt], max_new_tokens=6) == expected
        with mock.patch.object(model.memory_encoder, "encode_units", return_value=[]) as encode:
            assert model.generate([prompt], max_new_tokens=6) == expected
        encode.assert_called_once_with([], to_cpu=True)


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
