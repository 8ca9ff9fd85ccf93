"""Reckoned costs beside torch's own counter, and the figures of the design.

`FlopCounterMode` counts matrix products and attention, of the latter every pair of the square whatever the mask: counts
are compared without the causal half, and exactly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from tests.support import flops
from tests.support.tiny import make_decoder, make_encoder, make_memory_encoder
from utils.compress.prompt_embeds import encode_wire
from utils.model.adapter import Adapter
from utils.model.code_chunker import CodeChunker
from utils.model.code_llava_model import MemoryEncoder
from utils.model.config import CompressionConfig
from utils.model.prompt import MemorySpan, num_latents
from utils.training.flops import PairCost, TransformerCost

CONFIGS = [
    CompressionConfig(chunk_size=4, window=32),
    CompressionConfig(chunk_size=4, window=4, pooling="eos"),
    CompressionConfig(chunk_size=4, window=16, overlap=3, mask="bidirectional", pooling="concat"),
    CompressionConfig(chunk_size=4, window=16, adapter="attn_mlp", num_adapter_layers=2),
    CompressionConfig(chunk_size=4, window=16, adapter="mlp_attn", num_adapter_layers=1),
]


def counted(run: Any) -> int:
    with torch.inference_mode(), flops.counter() as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prefill(family: str) -> None:
    decoder = make_decoder(family)
    cost = TransformerCost.of(decoder)
    ids = torch.arange(75)[None]
    assert counted(lambda: decoder(ids, logits_to_keep=1)) == cost.forward_flops([75], causal=False, logits=1)
    assert counted(lambda: decoder(ids)) == cost.forward_flops([75], causal=False, logits=75)
    saved = cost.forward_flops([75], causal=False) - cost.forward_flops([75], causal=True)
    assert saved == 4 * 2 * 4 * 8 * 75 * 74 / 2  # layers, heads, head size, pairs above the diagonal


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.pooling}-{c.adapter}")
def test_encoding(config: CompressionConfig, family: str) -> None:
    if family == "bert" and config.adapter == "attn_mlp":
        pytest.skip("its attention layers are sized by a decoder-like encoder")
    memory_encoder = make_memory_encoder(config, family)
    cost = PairCost.of(memory_encoder, make_decoder())
    lengths = [1, 33, 70]
    spans = [
        MemorySpan(text="", token_ids=list(range(n)), start=0, stop=num_latents(n, 4), chunk_size=4) for n in lengths
    ]
    windows = cost.encoder.forward_flops(cost.window_lengths(lengths), causal=False)
    latents = cost.adapter.forward_flops([span.num_latents for span in spans], causal=False)
    assert counted(lambda: memory_encoder(spans)) == windows + latents
    causal = cost.encoder.forward_flops(cost.window_lengths(lengths), causal=config.causal) + latents
    assert cost.encode_flops(lengths) == causal


def test_training() -> None:
    """Forward and backward; the counter counts the fused kernel's five products as well."""
    encoder = make_encoder("llama").train()
    cost = TransformerCost.of(encoder)
    with flops.counter() as counter:
        encoder(torch.arange(60)[None], use_cache=False).last_hidden_state.sum().backward()
    expected = cost.training_flops([60], causal=False, learning_weights=cost.matrix_weights)
    assert counter.get_total_flops() == expected
    again = cost.training_flops([60], causal=False, learning_weights=0, recompute=True)
    assert again == cost.training_flops([60], causal=False, learning_weights=0) + cost.forward_flops([60], causal=False)


def test_weight_bytes_count_tied_weights_once() -> None:
    tied = TransformerCost.of(make_decoder("qwen3"))
    untied = TransformerCost.of(make_decoder("llama"))
    assert tied.head_weights == untied.head_weights == 264 * 32
    assert untied.weight_bytes - tied.weight_bytes > 4 * 264 * 32 - 1000
    assert TransformerCost.of(make_decoder().bfloat16()).weight_bytes == tied.weight_bytes / 2


def test_key_value_cache_holds_what_is_reckoned() -> None:
    decoder = make_decoder()
    cost = PairCost.of(make_memory_encoder(CONFIGS[0]), decoder)
    with torch.inference_mode():
        cache = decoder(torch.arange(50)[None], use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == cost.decoder.kv_cache_bytes(50)


def test_wire_holds_what_is_reckoned() -> None:
    pytest.importorskip("pybase64")
    cost = PairCost.of(make_memory_encoder(CONFIGS[0]), make_decoder())
    rows = torch.zeros(500, cost.width)
    assert cost.wire_bytes(500) <= len(encode_wire(rows)) < cost.wire_bytes(500) + 3000


@pytest.fixture(scope="module")
def published_pair() -> PairCost:
    """Shapes of Qwen3-Embedding-0.6B in front of Qwen3-4B, without weights."""
    shared = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    small = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, **shared
    )
    large = Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **shared
    )
    config = CompressionConfig(chunk_size=16, window=1024)
    with torch.device("meta"):
        encoder = Qwen3Model(small).bfloat16()
        decoder = Qwen3ForCausalLM(large).bfloat16()
        adapter = Adapter(1024, 2560, config=config).bfloat16()
        return PairCost.of(MemoryEncoder(CodeChunker(encoder, config), adapter), decoder)


@pytest.mark.parametrize(
    ("memory", "ideal", "ideal_cached"), [(4096, 5.8, 18.5), (32768, 11.4, 34.6), (131072, 28.7, 76.3)]
)
def test_the_design_s_ideal_speedups(published_pair: PairCost, memory: int, ideal: float, ideal_cached: float) -> None:
    rows = {"full_rows": memory, "prompt_rows": memory // 16, "span_lengths": [memory]}
    # The design leaves out the adapter and the one row of logits.
    assert published_pair.ideal_speedup(**rows) == pytest.approx(ideal, rel=0.03)
    assert published_pair.ideal_speedup(**rows, cached=True) == pytest.approx(ideal_cached, rel=0.05)


def test_the_design_s_bytes(published_pair: PairCost) -> None:
    assert published_pair.wire_bytes(3) == 4 * 2560 * 2
    assert published_pair.decoder.kv_cache_bytes(1) == 147456
