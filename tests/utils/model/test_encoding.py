"""The fast encoders against the plain one, and what must not change a latent."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from tests.support.marks import requires_gpu
from tests.support.reference import reference_latents
from tests.support.tiny import ENCODER_WIDTH, make_decoder, make_encoder, make_memory_encoder
from utils.errors import ConfigError
from utils.model.code_chunker import CodeChunker, tokens_that_fit
from utils.model.code_llava_model import MemoryEncoder
from utils.model.config import CompressionConfig
from utils.model.pooling import turned_sum
from utils.model.prompt import MemorySpan, num_latents
from utils.model.windows import plan_windows

TOLERANCE = 1e-5
PAD = 256
WINDOW = 16
FAMILIES = ("qwen3", "llama", "bert")
# One token, less than a chunk, a whole chunk, a whole window, several windows with a short last chunk.
LENGTHS = (1, 3, 4, 16, 33, 70)
MIXED_SIZES = (4, 8, 2, 4, 16, 1)


def make_config(
    pooling: str, mask: str, overlap: int = 0, adapter: str = "mlp", layers: int = 2, token_columns: bool = False
) -> CompressionConfig:
    return CompressionConfig(
        chunk_size=4,
        window=WINDOW,
        pooling=pooling,
        mask=mask,
        overlap=overlap,
        adapter=adapter,
        num_adapter_layers=0 if adapter == "mlp" else layers,
        token_columns=token_columns,
    )


def make_span(length: int, chunk_size: int = 4, seed: int = 0) -> MemorySpan:
    draw = random.Random(f"{seed} {length}")
    ids = [draw.randrange(256) for _ in range(length)]
    return MemorySpan(text="", token_ids=ids, start=0, stop=num_latents(length, chunk_size), chunk_size=chunk_size)


def spans_for(config: CompressionConfig) -> list[MemorySpan]:
    sizes = itertools.repeat(4) if config.pooling == "concat" else MIXED_SIZES
    return [make_span(length, size) for length, size in zip(LENGTHS, sizes, strict=False)]


def reference(config: CompressionConfig, family: str, memory_encoder: MemoryEncoder, span: MemorySpan) -> torch.Tensor:
    encoder = make_encoder(family, attn_implementation="eager")
    layer_config = encoder.config if config.adapter == "attn_mlp" else make_decoder().config
    sized = config.with_chunk_size(span.chunk_size)
    return reference_latents(encoder, memory_encoder.adapter.state_dict(), layer_config, span.token_ids, sized, PAD)


def assert_all_close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert [x.shape for x in got] == [x.shape for x in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


SEMANTICS = [
    make_config(pooling, mask, overlap, adapter)
    for pooling, mask, overlap, adapter in itertools.product(
        ("eos", "mean", "concat", "rotary"), ("causal", "bidirectional"), (0, 5), ("mlp", "attn_mlp", "mlp_attn")
    )
    if not (pooling in ("concat", "rotary") and adapter == "attn_mlp")
] + [
    make_config(pooling, mask, overlap, adapter, token_columns=True)
    for pooling, mask, overlap, adapter in itertools.product(
        ("mean", "concat", "rotary"), ("causal", "bidirectional"), (0, 5), ("mlp", "mlp_attn")
    )
]

# All semantics with one family; with the others, each once: only the chunker meets the family's own code.
WITH_FAMILIES = [("qwen3", config) for config in SEMANTICS] + [
    (family, config)
    for family in ("llama", "bert")
    for config in SEMANTICS
    if config.adapter == "mlp" or (config.pooling, config.mask, config.overlap) == ("mean", "bidirectional", 5)
]


def name_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    tokens = "-tokens" if value.token_columns else ""
    return f"{value.pooling}-{value.mask}-{value.overlap}-{value.adapter}{tokens}"


def test_a_linear_map_takes_each_state_out_of_a_rotary_sum() -> None:
    torch.manual_seed(0)
    states = torch.randn(200, 4, 512)
    pooled = turned_sum(states)
    for place in range(4):
        alone = torch.zeros_like(states)
        alone[:, place] = states[:, place]
        turned = turned_sum(alone)
        # What the others leave behind is as long as they are, and points nowhere: the right one of 200 is nearest.
        nearest = (pooled @ turned.T).argmax(dim=1)
        assert nearest.tolist() == list(range(200))
    single = states[:, :1]
    torch.testing.assert_close(turned_sum(single), single[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "config"), WITH_FAMILIES, ids=name_of)
@torch.inference_mode()
def test_every_path_agrees_with_the_plain_encoder(family: str, config: CompressionConfig) -> None:
    packed = make_memory_encoder(config, family)
    assert packed.chunker.packed
    spans = spans_for(config)
    expected = [reference(config, family, packed, span) for span in spans]
    assert_all_close(packed(spans), expected)
    for implementation in ("eager", "sdpa"):
        encoder = make_encoder(family, attn_implementation=implementation)
        grouped = make_memory_encoder(config, encoder=encoder, packed=False)
        assert_all_close(grouped(spans), expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", SEMANTICS[::3], ids=name_of)
@pytest.mark.parametrize("packed", [True, False])
@torch.inference_mode()
def test_company_changes_no_latent(config: CompressionConfig, packed: bool) -> None:
    """Order, batch size, packing and micro-batches."""
    encoder = make_memory_encoder(config, packed=packed)
    spans = [*spans_for(config), *[make_span(length, 4, seed=7) for length in (5, 40)]]
    alone = [encoder([span])[0] for span in spans]
    assert_all_close(encoder(spans), alone)
    assert_all_close(encoder(spans[::-1])[::-1], alone)
    for batch_tokens in (1, 20, 100):
        encoder.chunker.batch_tokens = batch_tokens
        assert_all_close(encoder(spans), alone)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_masks_are_real(family: str, packed: bool) -> None:
    """Causal: a later token changes nothing before it. Bidirectional: it does, inside its window and overlap."""
    span = make_span(48)
    changed_ids = [*span.token_ids]
    changed_ids[15] = (changed_ids[15] + 1) % 256
    changed = MemorySpan(text="", token_ids=changed_ids, start=0, stop=span.stop, chunk_size=4)
    touched = {"causal": {3, 4, 5, 6, 7}, "bidirectional": set(range(8))}
    for mask, expected in touched.items():
        encoder = make_memory_encoder(make_config("mean", mask, overlap=3), family, packed=packed)
        before, after = encoder([span, changed])
        moved = {i for i in range(len(before)) if (before[i] - after[i]).abs().max() > TOLERANCE}
        assert moved == expected, mask


def test_windows_follow_the_contract() -> None:
    ids = list(range(40))
    causal = plan_windows(ids, make_config("mean", "causal", overlap=5))
    assert [(list(w.left), w.core[0], len(w.core), list(w.right)) for w in causal] == [
        ([], 0, 16, []),
        ([11, 12, 13, 14, 15], 16, 16, []),
        ([27, 28, 29, 30, 31], 32, 8, []),
    ]
    both = plan_windows(ids, make_config("mean", "bidirectional", overlap=5))
    assert [list(w.right) for w in both] == [[16, 17, 18, 19, 20], [32, 33, 34, 35, 36], []]
    assert [w.num_latents for w in both] == [4, 4, 2]
    assert [token for w in both for token in w.core] == ids


@torch.inference_mode()
def test_positions_begin_at_zero_in_each_window() -> None:
    encoder = make_memory_encoder(make_config("mean", "causal"))
    ids = list(make_span(16).token_ids)
    twice = MemorySpan(text="", token_ids=ids * 2, start=0, stop=8, chunk_size=4)
    first, second = encoder([twice])[0].split(4)
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_bfloat16_stays_bfloat16() -> None:
    encoder = make_memory_encoder(make_config("mean", "causal", adapter="mlp_attn")).to(torch.bfloat16)
    assert encoder([make_span(20)])[0].dtype == torch.bfloat16


@torch.inference_mode()
def test_no_spans_give_no_latents() -> None:
    assert make_memory_encoder(make_config("mean", "causal"))([]) == []


def test_gradients_reach_encoder_and_adapter_without_padding_rows() -> None:
    memory_encoder = make_memory_encoder(make_config("eos", "bidirectional", 5, "attn_mlp"))
    sum(latents.square().sum() for latents in memory_encoder([make_span(20), make_span(3)])).backward()
    # Byte ids that do not occur have no gradient in the table; every other parameter has one.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in memory_encoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_token_columns_are_the_embeddings_of_a_chunk_in_their_places(family: str) -> None:
    config = make_config("rotary", "bidirectional", 5, token_columns=True)
    memory_encoder, spans = make_memory_encoder(config, family), spans_for(config)
    assert (memory_encoder.chunker.width, memory_encoder.chunker.token_width) == (2 * ENCODER_WIDTH, 2 * ENCODER_WIDTH)
    assert_all_close(memory_encoder(spans), [reference(config, family, memory_encoder, span) for span in spans])


@torch.inference_mode()
def test_new_token_columns_change_no_latent_until_they_learn() -> None:
    for pooling in ("mean", "rotary", "concat"):
        memory_encoder = make_memory_encoder(make_config(pooling, "causal")).bfloat16()
        spans = spans_for(memory_encoder.config)
        before = memory_encoder(spans)
        memory_encoder.add_token_columns()
        assert memory_encoder.config.token_columns
        assert {p.dtype for p in memory_encoder.parameters()} == {torch.bfloat16}
        assert all(torch.equal(a, b) for a, b in zip(memory_encoder(spans), before, strict=True))
        torch.nn.init.normal_(memory_encoder.adapter.token_fc.weight)
        assert not any(torch.equal(a, b) for a, b in zip(memory_encoder(spans), before, strict=True))


def test_new_token_columns_have_a_gradient() -> None:
    memory_encoder = make_memory_encoder(make_config("mean", "causal"))
    memory_encoder.add_token_columns()
    sum(latents.square().sum() for latents in memory_encoder([make_span(20), make_span(3)])).backward()
    gradient = memory_encoder.adapter.token_fc.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("pooling", "adapter"), [("eos", "mlp"), ("mean", "attn_mlp")])
def test_token_columns_need_a_place(pooling: str, adapter: str) -> None:
    memory_encoder = make_memory_encoder(make_config(pooling, "causal", adapter=adapter))
    with pytest.raises(ConfigError, match="token_columns"):
        memory_encoder.add_token_columns()
    assert not memory_encoder.config.token_columns


def test_concat_fixes_the_chunk_size() -> None:
    memory_encoder = make_memory_encoder(make_config("concat", "causal"))
    assert memory_encoder.chunker.width == 4 * ENCODER_WIDTH
    with pytest.raises(ConfigError, match="concat pooling fixes it to 4"):
        memory_encoder([make_span(20, chunk_size=8)])


@pytest.mark.parametrize("packed", [True, False])
def test_a_window_longer_than_the_encoders_positions(packed: bool) -> None:
    config = CompressionConfig(chunk_size=4, window=600)
    memory_encoder = make_memory_encoder(config, packed=packed)
    with pytest.raises(ConfigError, match=r" 600 .* 512 "):
        memory_encoder([make_span(600)])
    assert len(memory_encoder([make_span(512)])[0]) == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pad_token_id": None}, "eos pooling needs a pad token"),
        ({"batch_tokens": 0}, "--batch-tokens must be at least 1, got 0"),
    ],
)
def test_a_chunker_that_cannot_work(changes: dict[str, Any], reason: str) -> None:
    config = make_config("eos", "causal")
    with pytest.raises(ConfigError, match=reason):
        CodeChunker(make_encoder(), config, **{"pad_token_id": PAD, **changes})


def test_packed_rows_where_the_model_has_none() -> None:
    encoder = make_encoder()
    encoder._supports_attention_backend = False
    config = make_config("mean", "causal")
    assert not CodeChunker(encoder, config).packed
    with pytest.raises(ConfigError, match="Qwen3Model"):
        CodeChunker(encoder, config, compiled=True)


@torch.inference_mode()
def test_sliding_windows_of_an_encoder_are_kept() -> None:
    """A model that looks back only so far gives the same states packed and on its own."""
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    settings = make_encoder().config.to_dict() | {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention"],
    }
    encoder = Qwen3Model(Qwen3Config(**settings, attn_implementation="sdpa")).eval()
    ids = torch.tensor([list(make_span(16).token_ids)])
    alone = encoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    config = CompressionConfig(chunk_size=1, window=WINDOW)
    packed = torch.cat(CodeChunker(encoder, config)(plan_windows(ids[0].tolist(), config)))
    torch.testing.assert_close(packed, alone, atol=TOLERANCE, rtol=0)


@requires_gpu
@pytest.mark.parametrize("config", SEMANTICS[::4], ids=name_of)
@torch.inference_mode()
def test_cuda_agrees_with_the_cpu(config: CompressionConfig) -> None:
    encoder = make_memory_encoder(config)
    spans = spans_for(config)
    expected = encoder(spans)
    got = [latents.cpu() for latents in encoder.to("cuda")(spans)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_positions_behind_the_padding_rows(packed: bool) -> None:
    """RoBERTa's position table begins with rows for padding; its own forward knows, and so must ours."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300,
        hidden_size=ENCODER_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=WINDOW + 2,
        pad_token_id=1,
        attn_implementation="sdpa",
    )
    encoder = RobertaModel(config, add_pooling_layer=False).eval()
    ids = [draw % 200 + 5 for draw in range(WINDOW)]
    with torch.inference_mode():
        expected = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        compression = CompressionConfig(chunk_size=1, window=WINDOW, mask="bidirectional")
        (states,) = CodeChunker(encoder, compression, packed=packed)(plan_windows(ids, compression))
    torch.testing.assert_close(states, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", ["qwen3", "bert"])
@torch.inference_mode()
def test_compiled_full_batches_give_the_same_latents(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("mean", "bidirectional" if family == "bert" else "causal")
    plain = make_memory_encoder(config, family)
    settings = {"batch_tokens": 3 * WINDOW, "pad_token_id": PAD}
    compiled = MemoryEncoder(CodeChunker(plain.chunker.encoder, config, compiled=True, **settings), plain.adapter)
    # Seven full windows and a short one: two batches of the compiled shape, one of another.
    spans = [make_span(7 * WINDOW + 5)]
    shapes, compiling = [], torch.compile

    def noting(encoder: Any, **options: Any) -> Any:
        run = compiling(encoder, **options)
        return lambda **inputs: (shapes.append(inputs["input_ids"].shape[1]), run(**inputs))[1]

    monkeypatch.setattr(torch, "compile", noting)
    for got, expected in zip(compiled(spans), plain(spans), strict=True):
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert shapes == [3 * WINDOW, 3 * WINDOW]


def test_passes_are_as_large_as_the_free_memory_allows() -> None:
    encoder = make_encoder("qwen3")
    assert tokens_that_fit(encoder, None) == 4096
    few, more, most = (tokens_that_fit(encoder, room << 20) for room in (1, 100, 1 << 20))
    assert 1024 == few < more < most == 65536
    per_token = (8 * encoder.config.hidden_size + 3 * encoder.config.intermediate_size) * encoder.dtype.itemsize
    assert more * per_token <= 25 << 20
    chunker = CodeChunker(encoder, make_config("mean", "causal"))
    assert chunker.pass_tokens == 4096
    chunker.batch_tokens = 7
    assert chunker.pass_tokens == 7
