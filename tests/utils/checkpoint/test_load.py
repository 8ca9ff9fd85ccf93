"""Loading parts: every family in both layouts, LoRA folders, and the table alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.support.loaded import check_loaded
from tests.support.tiny import make_model, tokenizers, write_checkpoint
from utils.checkpoint import load as weights
from utils.checkpoint.layout import CODE_LLAVA, LCLM, Layout
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.save import save_checkpoint
from utils.checkpoint.settings import ON_CPU, EncoderSettings
from utils.compress.compressor import Compressor
from utils.errors import CheckpointError, ConfigError
from utils.inference.inference import load_model
from utils.model.config import CompressionConfig

TEXT = "Explain <|memory_start|>def f(): return 1<|memory_end|> and <|memory_start|>x<|memory_end|>"
CONFIGS = {
    CODE_LLAVA.name: CompressionConfig(chunk_size=4, window=4, pooling="eos"),
    LCLM.name: CompressionConfig(
        chunk_size=4, window=16, overlap=3, mask="bidirectional", adapter="attn_mlp", num_adapter_layers=2
    ),
}


# Encoders of three families, decoders of two, both layouts: each beside each other once.
FAMILIES = [
    ("qwen3", "qwen3", CODE_LLAVA),
    ("qwen3", "llama", LCLM),
    ("llama", "qwen3", LCLM),
    ("llama", "llama", CODE_LLAVA),
    ("bert", "qwen3", CODE_LLAVA),
    ("bert", "llama", LCLM),
]


@pytest.mark.parametrize(("family", "decoder_family", "layout"), FAMILIES)
def test_what_is_saved_is_what_is_loaded(family: str, decoder_family: str, layout: Layout, tmp_path: Path) -> None:
    config = CONFIGS[layout.name]
    original = make_model(config, family, decoder_family)
    write_checkpoint(tmp_path / "pair", config, family=family, decoder_family=decoder_family, layout=layout)
    model, prompt = check_loaded(original, tmp_path / "pair", TEXT)
    assert model.generate([prompt], max_new_tokens=5) == original.generate([prompt], max_new_tokens=5)


def make_lora(root: Path, part: str, kind: Any, base: str, *, shrink: int | None = None) -> torch.nn.Module:
    """Turn a part of a checkpoint into a LoRA folder over a base beside it; returns the merged model."""
    base_folder = (root / part / base).resolve()
    shutil.copytree(root / part, base_folder, ignore=shutil.ignore_patterns("base", "tokenizer*", "*.jinja"))
    model = kind.from_pretrained(base_folder)
    if shrink is not None:
        # A base as it was published: without rows for the markers.
        model.resize_token_embeddings(shrink)
        model.save_pretrained(base_folder)
        weights.resize_table(model, len(tokenizers().decoder))
    torch.manual_seed(5)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    (root / part / "model.safetensors").unlink()
    (root / part / "config.json").unlink()
    tuned.save_pretrained(root / part)
    settings = json.loads((root / part / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base
    (root / part / "adapter_config.json").write_text(json.dumps(settings))
    return tuned.merge_and_unload().eval()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
def test_lora_of_decoder_and_encoder_is_merged(copied: Callable[[str], Path]) -> None:
    root = copied("code-llava")
    plain = load_model(root, device="cpu")[0]
    decoder = make_lora(root, "llm", AutoModelForCausalLM, "../llm-base", shrink=259)
    encoder = make_lora(root, "embedder", AutoModel, "../embedder-base")
    model, _, processor = load_model(root, device="cpu")
    prompt = processor.parse_raw(TEXT)
    with torch.inference_mode():
        ids = torch.tensor([list(range(20))])
        for loaded, tuned, before in (
            (model.code_chunker.encoder, encoder, plain.code_chunker.encoder),
            (model.decoder.model, decoder.model, plain.decoder.model),
        ):
            got, expected = loaded.state_dict(), tuned.state_dict()
            assert got.keys() == expected.keys()
            for name in got:
                torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=0)
            assert any(not torch.equal(got[n], v) for n, v in before.state_dict().items() if "q_proj" in n)
        torch.testing.assert_close(model.decoder(ids).logits, decoder(ids).logits, atol=1e-5, rtol=0)
        # The table of a LoRA decoder is that of its base, resized: the same in every load.
        compressor = Compressor.load(root, settings=ON_CPU)
        expected_rows = model.embed_prompt(prompt)
        torch.testing.assert_close(compressor.compress([prompt])[0].values_TD, expected_rows, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
def test_lora_without_a_base(copied: Callable[[str], Path]) -> None:
    root = copied("code-llava")
    make_lora(root, "llm", AutoModelForCausalLM, "../llm-base")
    shutil.rmtree(root / "llm-base")
    with pytest.raises(CheckpointError, match="llm-base"):
        load_model(root, device="cpu")
    (root / "llm" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="do not say their base"):
        load_model(root, device="cpu")


def lora_tensors(layers: range, rank: int = 2, module: str = "self_attn.q_proj") -> dict[str, torch.Tensor]:
    """Tensors of a LoRA on the tiny encoder (width 24, 4 heads of 8), as peft names them."""
    name = f"base_model.model.layers.{{}}.{module}.lora_{{}}.weight"
    state = {name.format(layer, "A"): torch.ones(rank, 24) for layer in layers}
    return state | {name.format(layer, "B"): torch.ones(32, rank) for layer in layers}


def write_lora(root: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Put LoRA weights in place of the encoder's own; returns their folder."""
    folder = root / "embedder"
    shutil.copytree(folder, root / "base")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": "../base", "peft_type": "LORA", "r": 2, "lora_alpha": 2}
    settings |= {"target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


WHOLE = lora_tensors(range(2))


@pytest.mark.parametrize(
    ("tensors", "changes", "wanted"),
    [
        (lora_tensors(range(1)), {}, r"layers\.1\.self_attn\.q_proj\.lora_A.* is missing \(2 of 4 missing"),
        ({}, {}, "is missing .4 of 4 missing, 0 unknown"),
        (lora_tensors(range(3)), {}, r"layers\.2\..* no place .* 2 unknown"),
        (WHOLE | lora_tensors(range(2), module="self_attn.k_proj"), {}, r"k_proj\.lora_A.* no place .* 4 unknown"),
        (WHOLE | {"x": torch.ones(1)}, {}, "x has no place"),
        (lora_tensors(range(2), rank=3), {}, r"q_proj\.lora_A.*\[3, 24\].*\[2, 24\]"),
        ({name: tensor.to(torch.int8) for name, tensor in WHOLE.items()}, {}, r"lora_A.*\(4 such tensors"),
        (WHOLE, {"r": 10**12}, "rank 1000000000000"),
        (WHOLE, {"r": 0}, "rank 0"),
        (WHOLE, {"r": None}, "rank None"),
        (WHOLE, {"rank_pattern": {"q_proj": 10**12}}, "rank 1000000000000"),
        (WHOLE, {"peft_type": "PREFIX_TUNING"}, "peft_type"),
        (WHOLE, {"target_modules": ["nothing"]}, "nothing"),
        (WHOLE, {"target_modules": 5}, "."),
        (WHOLE, {"lora_alpha": "x"}, "."),
        (WHOLE, {"megatron_config": {"a": 1}}, "megatron_config"),
        (WHOLE, {"auto_map": {"a": "b"}}, "auto_map"),
        (WHOLE, {"base_model_name_or_path": "."}, "LoRA weights itself"),
        (WHOLE, {"base_model_name_or_path": 5}, "base_model_name_or_path"),
        (WHOLE, {"base_model_name_or_path": "x" * 5000}, "no folder on this machine"),
        (WHOLE, {"base_model_name_or_path": "\ud800"}, "no folder on this machine"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_lora_that_does_not_fit(
    tensors: dict[str, torch.Tensor], changes: dict[str, Any], wanted: str, copied: Callable[[str], Path]
) -> None:
    folder = write_lora(copied("code-llava"), tensors, **changes)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        weights.load_memory_encoder(find_checkpoint(folder.parent), ON_CPU)
    assert str(folder) in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_whole_lora_is_added_to_the_base(copied: Callable[[str], Path]) -> None:
    root = copied("code-llava")
    name = "layers.1.self_attn.q_proj.weight"
    before = weights.load_memory_encoder(find_checkpoint(root), ON_CPU).chunker.encoder.state_dict()[name]
    write_lora(root, WHOLE)
    after = weights.load_memory_encoder(find_checkpoint(root), ON_CPU).chunker.encoder.state_dict()[name]
    # B·A of ones at rank 2, times alpha / rank.
    torch.testing.assert_close(after, before + 2.0)


def test_a_base_on_the_hub_is_named_and_not_fetched(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    folder = write_lora(copied("code-llava"), WHOLE, base_model_name_or_path="some-org/some-model")
    for way in (
        lambda: find_checkpoint(folder.parent).fingerprint,
        lambda: weights.load_memory_encoder(find_checkpoint(folder.parent), ON_CPU),
    ):
        with pytest.raises(CheckpointError, match="hf download some-org/some-model --local-dir") as caught:
            way()
        assert str(folder / "adapter_config.json") in str(caught.value)


def test_new_table_rows_are_the_mean_of_the_old() -> None:
    model = make_model(CONFIGS[CODE_LLAVA.name], decoder_family="llama").decoder
    before = model.get_input_embeddings().weight.detach().clone()
    heads = model.get_output_embeddings().weight.detach().clone()
    weights.resize_table(model, 264)
    assert model.get_input_embeddings().weight.shape[0] == 264
    weights.resize_table(model, 270)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(table[:264], before)
    assert torch.equal(head[:264], heads)
    torch.testing.assert_close(table[264:], before.mean(dim=0).expand(6, -1))
    assert table.shape[0] == head.shape[0] == model.config.vocab_size == 270


def test_compressing_opens_nothing_of_the_decoder_but_its_table(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied("lclm")
    opened: list[tuple[str, str]] = []
    open_file = weights.safe_open

    class Recorder:
        """A safetensors file that notes which tensors are read."""

        def __init__(self, path: Path, **arguments: Any) -> None:
            self.path, self.file = path, open_file(path, **arguments)

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            opened.append((Path(self.path).parent.name, name))
            return self.file.get_tensor(name)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the decoder was loaded")

    monkeypatch.setattr(weights, "safe_open", Recorder)
    monkeypatch.setattr(weights.AutoModelForCausalLM, "from_pretrained", refuse)
    compressor = Compressor.load(root, settings=ON_CPU)
    compressor.compress([compressor.parse_raw(TEXT)])
    assert opened == [("decoder", "model.embed_tokens.weight")]


@pytest.mark.parametrize("native", [True, False])
def test_dtype_is_as_stored_where_that_is_fast(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "has_native_bfloat16", lambda: native)
    half, fast = torch.bfloat16, torch.bfloat16 if native else torch.float32
    model = make_model(CONFIGS[CODE_LLAVA.name]).to(torch.bfloat16)
    save_checkpoint(tmp_path / "half", model, tokenizers())
    wanted = {None: fast, "auto": fast, "stored": half, "bfloat16": half, "float32": torch.float32}
    for dtype, expected in wanted.items():
        compressor = Compressor.load(tmp_path / "half", settings=EncoderSettings(device="cpu", dtype=dtype))
        assert compressor.memory_encoder.adapter.fc1.weight.dtype == expected
        # What is written is as stored unless something else is asked for, on every machine.
        written = torch.float32 if dtype == "float32" else half
        assert compressor.compress([compressor.parse_raw(TEXT)])[0].values_TD.dtype == written
        loaded = load_model(tmp_path / "half", device="cpu", dtype=dtype)[0]
        assert {p.dtype for p in loaded.parameters()} == {expected}
    with pytest.raises(ConfigError, match="--dtype float8: expected auto, stored, bfloat16"):
        Compressor.load(tmp_path / "half", settings=EncoderSettings(dtype="float8"))


@pytest.mark.parametrize("rope_dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_have_the_precision_of_the_checkpoint(rope_dtype: str, tmp_path: Path) -> None:
    config = CompressionConfig(chunk_size=4, window=4, pooling="eos", rope_dtype=rope_dtype)
    write_checkpoint(tmp_path / "pair", config)
    files = find_checkpoint(tmp_path / "pair")
    frequencies = weights.load_memory_encoder(files, ON_CPU).chunker.encoder.rotary_emb.inv_freq
    exact = make_model(config).code_chunker.encoder.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, exact.to(getattr(torch, rope_dtype)).float())


@pytest.mark.parametrize(
    ("device", "count", "reason"),
    [
        ("cuda", 0, "--device cuda: 0 CUDA devices are visible"),
        ("cuda:2", 2, "--device cuda:2: 2 CUDA devices are visible"),
        ("toaster", 0, "--device toaster: expected auto, cpu, cuda"),
    ],
)
def test_devices(device: str, count: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=reason):
        weights.resolve_device(device)
    assert weights.resolve_device("auto").type == ("cuda" if count else "cpu")
    assert weights.resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("part", ["llm", "embedder"])
def test_a_tied_table_may_have_the_heads_name(
    part: str, checkpoints: dict[str, Path], copied: Callable[[str], Path]
) -> None:
    root = copied("code-llava")
    config = json.loads((root / part / "config.json").read_text())
    (root / part / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    path = root / part / "model.safetensors"
    tensors = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in load_file(path).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    prompt = "a<|memory_start|>def f(): return 1<|memory_end|>"

    def embeds(folder: Path) -> torch.Tensor:
        compressor = Compressor.load(folder, chunk_size=4, settings=ON_CPU)
        return compressor.compress([compressor.parse_raw(prompt)])[0].values_TD

    assert torch.equal(embeds(root), embeds(checkpoints["code-llava"]))
    # Untied, the table is lost.
    (root / part / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match="embed"):
        embeds(root)


def test_scaled_embeddings_are_refused(copied: Callable[[str], Path]) -> None:
    root = copied("code-llava")
    from transformers import GemmaConfig

    GemmaConfig(hidden_size=32, vocab_size=264).save_pretrained(root / "llm")
    with pytest.raises(CheckpointError, match="embeddings of gemma models are scaled"):
        Compressor.load(root, settings=ON_CPU)
