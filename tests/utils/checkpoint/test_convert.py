"""The converter: trainers' states and both layouts, to the bit; whatever does not fit is an error with names."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests.support.states import State, Trap, assert_is, parameters
from tests.support.tiny import make_model, tokenizers
from utils.checkpoint.convert.__main__ import main
from utils.checkpoint.convert.conversion import Conversion, convert
from utils.checkpoint.convert.names import pair_names
from utils.checkpoint.convert.states import find_state
from utils.checkpoint.layout import CODE_LLAVA, LAYOUTS, LCLM
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.lora import is_peft_folder
from utils.checkpoint.save import save_checkpoint
from utils.checkpoint.settings import StateOptions
from utils.errors import CheckpointError
from utils.files import PROJECT_ROOT
from utils.inference.inference import load_model
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.config import CompressionConfig

CONFIG = CompressionConfig(chunk_size=4, window=32)


@pytest.fixture
def trained() -> CodeLLaVAModel:
    """The pair that `base` holds, with other weights."""
    model = make_model(CONFIG)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "base"
    save_checkpoint(folder, make_model(CONFIG), tokenizers())
    return folder


@pytest.fixture
def base(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "base")


@pytest.fixture
def put(base: Path, tmp_path: Path) -> Callable[..., Conversion]:
    """Save tensors as one file and convert it."""

    def convert_tensors(state: State, **options: Any) -> Conversion:
        file, new = tmp_path / "model.safetensors", tmp_path / "new"
        save_file(state, file)
        return convert(file, new, base=base, options=StateOptions(**options))

    return convert_tensors


# Layouts


@pytest.mark.parametrize("golden", ["code_llava_c8", "lclm_eos_r8_w32", "lclm_mean_r4_w32"])
def test_layouts_there_and_back(golden: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied(golden)
    chunk_size = 8 if golden.startswith("code") else None
    here, there = (LCLM, CODE_LLAVA) if chunk_size is None else (CODE_LLAVA, LCLM)
    convert(source, tmp_path / "other", layout=there, chunk_size=chunk_size)
    convert(tmp_path / "other", tmp_path / "back", layout=here)
    before, back = find_checkpoint(source, chunk_size), find_checkpoint(tmp_path / "back")
    assert find_checkpoint(tmp_path / "other").layout is there
    assert back.layout is here
    assert back.config == before.config
    for name in (*here.adapter, *(f"{part}/model.safetensors" for part in (here.decoder, here.encoder))):
        one, two = load_file(source / name), load_file(tmp_path / "back" / name)
        # Tied heads may be stored or left out.
        one, two = ({k: v for k, v in x.items() if k != "lm_head.weight" or not _tied(source)} for x in (one, two))
        torch.testing.assert_close(two, one, rtol=0, atol=0)
    for part in (here.decoder, here.encoder):
        one, two = (json.loads((root / part / "tokenizer.json").read_text()) for root in (source, tmp_path / "back"))
        assert one == two


def _tied(root: Path) -> bool:
    folder = next(root / layout.decoder for layout in LAYOUTS if (root / layout.decoder).is_dir())
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


def test_a_checkpoint_with_bin_parts_becomes_safetensors(base: Path, tmp_path: Path) -> None:
    before = parameters(load_model(base, device="cpu")[0])
    states = {part: load_file(base / part / "model.safetensors") for part in ("llm", "embedder")}
    for part in states:
        (base / part / "model.safetensors").unlink()
    torch.save(states["llm"], base / "llm" / "pytorch_model.bin")
    # Two shards and their index.
    names = sorted(states["embedder"])
    places = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({n: states["embedder"][n] for n in names if places[n] == file}, base / "embedder" / file)
    (base / "embedder" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"pickled.*utils\.checkpoint\.convert"):
        find_checkpoint(base)
    convert(base, tmp_path / "new")
    assert_is(tmp_path / "new", before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "new"]


# States


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("model.safetensors", ""),
        ("pytorch_model.bin", "module."),
        ("model.safetensors", "_orig_mod.module."),
        ("pytorch_model.bin", "model._fsdp_wrapped_module."),
    ],
)
def test_one_file(file: str, prefix: str, base: Path, trained: CodeLLaVAModel, tmp_path: Path) -> None:
    state = {prefix + name: p for name, p in parameters(trained).items()}
    (save_file if file.endswith("s") else torch.save)(state, tmp_path / file)
    result = convert(tmp_path / file, tmp_path / "new", base=base)
    assert (result.tensors, result.lora_layers, result.from_base) == (len(state), 0, 0)
    assert_is(tmp_path / "new", parameters(trained))
    # Configurations and tokenizers are the base's.
    for name in ("llm/config.json", "llm/tokenizer.json", "embedder/config.json", "model_config.json"):
        assert (tmp_path / "new" / name).read_text() == (base / name).read_text()


PUBLISHED = {
    "code-llava": {
        "memory_encoder.chunker.encoder.": "code_chunker.embed_model.",
        "decoder.": "llm_model.",
        "memory_encoder.adapter.norm.": "code_norm_pre.",
        "memory_encoder.adapter.fc1.": "code_projection.0.",
        "memory_encoder.adapter.fc2.": "code_projection.2.",
    },
    "lclm": {"memory_encoder.chunker.encoder.": "encoder.embed_model.", "memory_encoder.adapter.": "adapter."},
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_names(layout: str, put: Callable[..., Conversion], trained: CodeLLaVAModel) -> None:
    state = parameters(trained)
    for ours, published in PUBLISHED[layout].items():
        state = {published + name.removeprefix(ours) if name.startswith(ours) else name: state[name] for name in state}
    assert not any("memory_encoder" in name for name in state)
    assert_is(put(state).output, parameters(trained))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_of_accelerate(safe: bool, base: Path, trained: CodeLLaVAModel, tmp_path: Path) -> None:
    from accelerate import Accelerator

    folder = tmp_path / "saved"
    Accelerator(cpu=True).save_model(trained, folder, max_shard_size="30KB", safe_serialization=safe)
    assert len(list(folder.glob("*-of-*"))) > 2
    result = convert(folder, tmp_path / "new", base=base)
    assert result.format == ("safetensors" if safe else "bin")
    assert_is(tmp_path / "new", parameters(trained))
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match="not there"):
        convert(folder, tmp_path / "half", base=base)
    assert not (tmp_path / "half").exists()


def test_the_newest_state_of_an_accelerate_run(base: Path, trained: CodeLLaVAModel, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained.parameters())
    model, optimizer = accelerator.prepare(trained, optimizer)
    for number in (2, 10):
        with torch.no_grad():
            model.decoder.get_input_embeddings().weight.add_(number)
        accelerator.save_state(tmp_path / "run" / f"checkpoint_{number}")
    result = convert(tmp_path / "run", tmp_path / "new", base=base)
    assert result.source.endswith("checkpoint_10")
    assert_is(tmp_path / "new", parameters(model))


def test_dtype_is_the_bases_or_the_one_asked_for(base: Path, trained: CodeLLaVAModel, tmp_path: Path) -> None:
    halved = make_model(CONFIG).to(torch.bfloat16)
    save_checkpoint(tmp_path / "half", halved, tokenizers())
    save_file(parameters(trained), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "bf16", base=tmp_path / "half")
    assert_is(tmp_path / "bf16", {name: p.to(torch.bfloat16) for name, p in parameters(trained).items()})
    convert(tmp_path / "model.safetensors", tmp_path / "full", base=tmp_path / "half", dtype="float32")
    assert_is(tmp_path / "full", parameters(trained))


# LoRA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_of_peft_is_merged(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _, _ = load_model(base, device="cpu")
    torch.manual_seed(3)
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["norm"],
        init_lora_weights=False,
        lora_dropout=0.0,
    )
    model.decoder = get_peft_model(model.decoder, config)
    model.decoder.base_model.model.model.norm.modules_to_save["default"].weight.data.fill_(0.5)
    state = {f"module.{name}": p for name, p in model.state_dict().items() if "lm_head" not in name}
    assert any("base_model.model.model.layers.0.self_attn.q_proj.base_layer" in name for name in state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    result = convert(
        tmp_path / "pytorch_model.bin", tmp_path / "new", base=base, options=StateOptions(lora_alpha={"decoder": 12})
    )
    assert result.lora_layers == 4
    model.decoder = model.decoder.merge_and_unload()
    converted = parameters(load_model(tmp_path / "new", device="cpu")[0])
    torch.testing.assert_close(converted, parameters(model), rtol=1e-6, atol=1e-7)
    changed = "decoder.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(converted[changed], parameters(load_model(base, device="cpu")[0])[changed])


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_lora_folder_is_merged(suffix: str, base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    decoder = load_model(base, device="cpu")[0].decoder
    shutil.copytree(base / "llm", base / "llm-base")
    for name in ("model.safetensors", "config.json"):
        (base / "llm" / name).unlink()
    tuned = get_peft_model(decoder, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(base / "llm")
    settings = json.loads((base / "llm" / "adapter_config.json").read_text())
    (base / "llm" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "../llm-base"}))
    if suffix == ".bin":
        torch.save(load_file(base / "llm" / "adapter_model.safetensors"), base / "llm" / "adapter_model.bin")
        (base / "llm" / "adapter_model.safetensors").unlink()
    convert(base, tmp_path / "new", layout=LCLM)
    assert not is_peft_folder(tmp_path / "new" / "decoder")
    merged = {f"decoder.{name}": p for name, p in tuned.merge_and_unload().named_parameters()}
    got = parameters(load_model(tmp_path / "new", device="cpu")[0])
    torch.testing.assert_close({name: got[name] for name in merged}, merged, rtol=1e-6, atol=1e-7)
    changed = load_file(base / "llm-base" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(got["decoder.model.layers.0.self_attn.q_proj.weight"], changed)


def test_lora_without_its_scale(put: Callable[..., Conversion], trained: CodeLLaVAModel) -> None:
    layer = "decoder.model.layers.0.self_attn.q_proj"
    state = parameters(trained) | {f"{layer}.lora_A.weight": torch.ones(2, 32)}
    with pytest.raises(CheckpointError, match="--decoder-lora-alpha"):
        put(state)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.default.weight.*lora_B"):
        put(state, lora_alpha={"decoder": 2})
    state[f"{layer}.lora_B.weight"] = state.pop(f"{layer}.lora_A.weight")
    with pytest.raises(CheckpointError, match=r"1 tensors.*lora_B"):
        put(state, lora_alpha={"decoder": 2})


UNFIT_LORA = {
    "lm_head": "1 tensors that LoRA weights change are tied to others",
    "gone": r"2 tensors have no place in the pair: decoder\.gone\.lora_A",
    "model.layers.0.self_attn.q_proj": r"LoRA of shapes \[\] and \[\] does not fit",
}


@pytest.mark.parametrize("layer", UNFIT_LORA)
def test_lora_of_what_cannot_be_merged(layer: str, put: Callable[..., Conversion], trained: CodeLLaVAModel) -> None:
    lora = {f"decoder.{layer}.lora_{ab}.default.weight": torch.tensor(1.0) for ab in "AB"}
    with pytest.raises(CheckpointError, match=UNFIT_LORA[layer]):
        put(parameters(trained) | lora, lora_alpha={"decoder": 2})


def test_two_lora_adapters_are_refused() -> None:
    names = [f"decoder.q_proj.lora_A.{adapter}.weight" for adapter in ("default", "second")]
    with pytest.raises(CheckpointError, match="two models or two LoRA adapters; keep one"):
        pair_names(names)


# What does not fit


def test_left_over_and_missing_are_counted_and_named(
    base: Path, put: Callable[..., Conversion], trained: CodeLLaVAModel, tmp_path: Path
) -> None:
    state = parameters(trained)
    with pytest.raises(CheckpointError, match=r"5 tensors.*: reward.0, reward.1, reward.2, …$"):
        put(state | {f"reward.{i}": torch.zeros(1) for i in range(5)})
    kept = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    lost = sorted(set(state) - set(kept))
    with pytest.raises(CheckpointError, match=rf"{len(lost)} tensors of the pair are missing: {lost[0]}, .*, …; pass"):
        put(kept)
    assert not (tmp_path / "new").exists()
    before = parameters(load_model(base, device="cpu")[0])
    result = put(kept, frozen_from_base=True)
    assert (result.tensors, result.from_base) == (len(kept), len(lost))
    assert_is(result.output, {name: kept.get(name, before[name]) for name in state})


def test_tied_tensors_must_be_equal(put: Callable[..., Conversion], trained: CodeLLaVAModel) -> None:
    table = trained.decoder.get_input_embeddings().weight.detach()
    with pytest.raises(CheckpointError, match=r"lm_head.*tie_word_embeddings"):
        put(parameters(trained) | {"decoder.lm_head.weight": table + 1})
    assert_is(put(parameters(trained) | {"decoder.lm_head.weight": table.clone()}).output, parameters(trained))


def test_another_shape(put: Callable[..., Conversion], trained: CodeLLaVAModel, tmp_path: Path) -> None:
    name = "memory_encoder.adapter.fc1.bias"
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \[32\], got \[3\]"):
        put(parameters(trained) | {name: torch.zeros(3)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", ".metadata"])
def test_nothing_untrusted_is_unpickled(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "sprung"
    monkeypatch.setenv("TRAP", str(trap))
    folder = tmp_path / "state"
    folder.mkdir()
    if name == ".metadata":
        (folder / name).write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"decoder.lm_head.weight": Trap()}, folder / name)
    with pytest.raises(CheckpointError, match=r"pathlib|are never loaded"):
        convert(folder, tmp_path / "new", base=base)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_objects_beside_the_tensors_stay_pickled(
    base: Path, trained: CodeLLaVAModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = tmp_path / "state"
    dcp.save({"model": parameters(trained), "rng": Trap()}, checkpoint_id=folder, no_dist=True)
    assert_is(convert(folder, tmp_path / "new", base=base).output, parameters(trained))
    assert not (tmp_path / "sprung").exists()
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"\.distcp"):
        convert(folder, tmp_path / "half", base=base)


def test_a_state_needs_its_base(base: Path, trained: CodeLLaVAModel, tmp_path: Path) -> None:
    save_file(parameters(trained), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"safetensors state.*--base"):
        convert(tmp_path / "model.safetensors", tmp_path / "new")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"empty.*deepspeed, fsdp, .*nothing"):
        convert(empty, tmp_path / "new", base=base)


def test_several_formats_side_by_side(trained: CodeLLaVAModel, tmp_path: Path) -> None:
    save_file(parameters(trained), tmp_path / "model.safetensors")
    torch.save(parameters(trained), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"safetensors and bin.*--format"):
        find_state(tmp_path)
    assert find_state(tmp_path, "bin").path == tmp_path / "pytorch_model.bin"
    with pytest.raises(CheckpointError, match="expected fsdp, got only safetensors and bin"):
        find_state(tmp_path, "fsdp")


def test_an_existing_output_is_kept(
    base: Path, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoints["lclm"])
    before = find_checkpoint(base).fingerprint
    assert main([source, str(base)]) == 1
    assert "exists: choose another folder, or pass --overwrite" in capsys.readouterr().err
    assert find_checkpoint(base).fingerprint == before
    assert main([str(base), str(base), "--overwrite"]) == 1
    assert "would write over what source" in capsys.readouterr().err
    assert main([source, str(base), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "code-llava"
    assert find_checkpoint(base).fingerprint != before


def test_deepspeed_is_asked_for(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", None)
    (tmp_path / "zero" / "global_step1").mkdir(parents=True)
    (tmp_path / "zero" / "latest").write_text("global_step1")
    with pytest.raises(CheckpointError, match="uv pip install deepspeed"):
        convert(tmp_path / "zero", tmp_path / "new", base=base)


@pytest.mark.parametrize("name", ["deepspeed", "fsdp", "safetensors"])
def test_shell_helpers(name: str, tmp_path: Path) -> None:
    """They hand their settings to the command; a stand-in for uv shows what it is given."""
    uv = tmp_path / "uv"
    uv.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    uv.chmod(0o755)
    script = PROJECT_ROOT / f"utils/inference/convert_{name}_to_hf.sh"
    settings = {"CHECKPOINT": "a b", "OUTPUT": "c", "BASE": "d", "LAYOUT": "lclm", "DECODER_LORA_ALPHA": "8"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
    done = subprocess.run([script, "--overwrite"], env=environment, capture_output=True, text=True, check=True, cwd="/")
    given = done.stdout.splitlines()
    assert given[:4] == ["run", "python", "-m", "utils.checkpoint.convert"]
    flags = ["--base", "d", "--layout", "lclm", "--decoder-lora-alpha", "8", "--overwrite"]
    assert given[4:] == ["a b", "c", "--format", name, *flags]
    assert importlib.util.find_spec(given[3]) is not None
    missing = subprocess.run([script], env={"PATH": environment["PATH"]}, capture_output=True, text=True, check=False)
    assert missing.returncode != 0
    assert "set CHECKPOINT" in missing.stderr


def test_no_folder_of_others_is_replaced(
    base: Path, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(checkpoints["lclm"])
    (base / "notes.txt").write_text("mine")
    assert main([source, str(base), "--overwrite"]) == 1
    assert "notes.txt" in capsys.readouterr().err
    before = find_checkpoint(base).fingerprint
    for output in (base / "llm", base.parent, base.parent / ".." / base.parent.name):
        assert main([str(base), str(output), "--overwrite"]) == 1
        assert "source" in capsys.readouterr().err
    assert main([source, str(base), "--base", str(base), "--overwrite"]) == 1
    assert "--base" in capsys.readouterr().err
    assert find_checkpoint(base).fingerprint == before
    assert (base / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    assert main([source, str(tmp_path / "file"), "--overwrite"]) == 1
    assert (tmp_path / "file").read_text() == "mine"
