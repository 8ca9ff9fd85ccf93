"""Whatever is wrong with a checkpoint: one error that says what and where, exit 1, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from general import step1, step1_raw_text
from tests.support.tiny import byte_tokenizer
from utils.inference import inference

TEXT = "Explain <|memory_start|>def f(): return 1<|memory_end|>"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shard(folder: Path) -> None:
    """Split the weights of a folder into two files: the embedding table, and everything else."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 if 'embed_tokens' in name else 2}-of-00002.safetensors" for name in tensors}
    for file in set(places.values()):
        kept = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(kept, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def shard_then(damage: Callable[[Path], Any], number: int) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        shard(root / "llm")
        damage(root / "llm" / f"model-0000{number}-of-00002.safetensors")

    return run


def lose_markers(root: Path) -> None:
    byte_tokenizer(markers=False, template="x").save_pretrained(root / "llm")


def lose_table_rows(root: Path) -> None:
    """The markers were added to the tokenizer, and the table was not resized."""
    edit_json(root / "llm" / "config.json", vocab_size=260)
    name = "model.embed_tokens.weight"
    edit_tensors(root / "llm" / "model.safetensors", lambda t: t.update({name: t[name][:260].clone()}))


def lose_encoder_rows(root: Path) -> None:
    edit_json(root / "embedder" / "config.json", vocab_size=250)
    name = "embed_tokens.weight"
    edit_tensors(root / "embedder" / "model.safetensors", lambda t: t.update({name: t[name][:250].clone()}))


PROJECTION = "projectors/code_projection.safetensors"
NORM = "projectors/code_norm_pre.safetensors"

# name → (damage, what the error must say); each on the tiny Code-LLaVA checkpoint
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no encoder": (lambda r: shutil.rmtree(r / "embedder"), ["not a complete checkpoint", "embedder/ is missing"]),
    "no decoder": (lambda r: shutil.rmtree(r / "llm"), ["llm/ is missing"]),
    "no adapter folder": (lambda r: shutil.rmtree(r / "projectors"), ["projectors/ is missing"]),
    "no adapter file": (lambda r: (r / NORM).unlink(), ["code_norm_pre.safetensors is missing"]),
    "cut adapter": (lambda r: truncate(r / PROJECTION), ["code_projection.safetensors cannot be read", "half copied"]),
    "adapter key missing": (
        lambda r: edit_tensors(r / PROJECTION, lambda t: t.pop("2.bias")),
        ["code_projection.safetensors", "expected the keys ['0.bias', '0.weight', '2.bias', '2.weight']"],
    ),
    "adapter key unknown": (
        lambda r: edit_tensors(r / PROJECTION, lambda t: t.update({"4.bias": torch.zeros(1)})),
        ["code_projection.safetensors", "4.bias"],
    ),
    "adapter of another encoder": (
        lambda r: edit_tensors(r / PROJECTION, lambda t: t.update({"0.weight": torch.zeros(32, 25)})),
        ["code_projection.safetensors", "fc1.weight: expected shape [32, 24], got [32, 25]"],
    ),
    "adapter of another decoder": (
        lambda r: edit_tensors(r / PROJECTION, lambda t: t.update({"2.weight": torch.zeros(16, 32)})),
        ["fc2.weight: expected shape [32, 32], got [16, 32]"],
    ),
    "adapter not a matrix": (
        lambda r: edit_tensors(r / PROJECTION, lambda t: t.update({"0.weight": torch.zeros(32)})),
        ["fc1.weight is missing or is not a matrix"],
    ),
    "cut encoder": (
        lambda r: truncate(r / "embedder/model.safetensors"),
        ["embedder/model.safetensors cannot be read"],
    ),
    "cut decoder": (lambda r: truncate(r / "llm/model.safetensors"), ["llm/model.safetensors cannot be read"]),
    "no encoder weights": (
        lambda r: (r / "embedder/model.safetensors").unlink(),
        ["embedder: no model.safetensors", "save_pretrained"],
    ),
    "no encoder config": (lambda r: (r / "embedder/config.json").unlink(), ["embedder/config.json is missing"]),
    "no tokenizer": (lambda r: (r / "llm/tokenizer_config.json").unlink(), ["llm/tokenizer_config.json is missing"]),
    "half a tokenizer": (lambda r: (r / "llm/tokenizer.json").unlink(), ["/llm", "tokenizer"]),
    "lost shard": (shard_then(Path.unlink, 2), ["1 shards that are not there", "model-00002-of-00002"]),
    "cut shard": (shard_then(truncate, 1), ["model-00001-of-00002.safetensors cannot be read"]),
    "cut shard that compressing does not read": (
        shard_then(truncate, 2),
        ["model-00002-of-00002.safetensors cannot be read"],
    ),
    "shard of another model": (
        shard_then(lambda path: edit_tensors(path, lambda t: t.pop("model.norm.weight")), 2),
        ["model-00002-of-00002.safetensors: the index promises model.norm.weight"],
    ),
    "encoder tensor missing": (
        lambda r: edit_tensors(r / "embedder/model.safetensors", lambda t: t.pop("layers.1.mlp.up_proj.weight")),
        ["embedder: layers.1.mlp.up_proj.weight is missing from the weights"],
    ),
    "encoder tensor of another shape": (
        lambda r: edit_tensors(
            r / "embedder/model.safetensors", lambda t: t.update({"layers.1.mlp.up_proj.weight": torch.zeros(5, 24)})
        ),
        ["embedder", "layers.1.mlp.up_proj.weight: expected shape [48, 24], got [5, 24]"],
    ),
    "encoder config with fewer layers": (
        lambda r: edit_json(r / "embedder/config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        ["embedder: config.json has no place for layers.1."],
    ),
    "decoder table of another shape": (
        lambda r: edit_tensors(
            r / "llm/model.safetensors", lambda t: t.update({"model.embed_tokens.weight": torch.zeros(264, 31)})
        ),
        ["llm", "embed_tokens.weight: expected shape [264, 32], got [264, 31]"],
    ),
    "unknown decoder": (lambda r: edit_json(r / "llm/config.json", model_type="martian"), ["llm", "martian"]),
    "unknown encoder": (lambda r: edit_json(r / "embedder/config.json", model_type="martian"), ["embedder", "martian"]),
    "broken config": (lambda r: (r / "llm/config.json").write_text("{"), ["llm", "config"]),
    "no markers": (lose_markers, ["llm: marker token <|memory_start|> is missing", "add the three markers"]),
    "markers without rows": (lose_table_rows, ["llm", "262 tokens", "260 rows"]),
    "encoder tokenizer without rows": (lose_encoder_rows, ["embedder", "tokens", "250 rows"]),
    "model config not JSON": (lambda r: (r / "model_config.json").write_text("{"), ["model_config.json is not JSON"]),
    "model config not an object": (
        lambda r: (r / "model_config.json").write_text("[]"),
        ["model_config.json: expected a JSON object, got list"],
    ),
    "model config impossible": (
        lambda r: edit_json(r / "model_config.json", pooling="max"),
        ["model_config.json: pooling: expected one of mean, eos, concat, rotary, got 'max'"],
    ),
    "model config gone": (
        lambda r: (r / "model_config.json").unlink(),
        ["does not say its chunk size", "--chunk-size"],
    ),
}


def assert_one_error(capsys: pytest.CaptureFixture[str], code: int, wanted: list[str]) -> None:
    out, err = capsys.readouterr()
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert err.rstrip().splitlines()[-1] == errors[0], err
    for text in wanted:
        assert text in errors[0]


@pytest.mark.parametrize("case", DAMAGES)
def test_compressing(
    case: str, copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, wanted = DAMAGES[case]
    root = copied("code-llava")
    damage(root)
    output = tmp_path / "out" / "rows.npy"
    argv = ["--text", TEXT, "--model-path", str(root), "--output", str(output), "--device", "cpu"]
    assert_one_error(capsys, step1_raw_text.main(argv), wanted)
    assert not output.parent.exists()


# What compressing does not open must be found by generating too.
DECODER_CASES = ["cut decoder", "lost shard", "cut shard", "no markers", "markers without rows", "unknown decoder"]
DECODER_CASES += ["broken config", "decoder table of another shape"]


@pytest.mark.parametrize("case", DECODER_CASES)
def test_generating(case: str, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    damage, wanted = DAMAGES[case]
    root = copied("code-llava")
    damage(root)
    argv = ["--checkpoint", str(root), "--max-tokens", "1", "--device", "cpu"]
    assert_one_error(capsys, inference.main(argv), wanted)


@pytest.mark.parametrize("command", ["compressing", "generating"])
def test_pointers_of_git_lfs(command: str, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Cloned without `git lfs`: any file may be one, also such as no parser would complain about."""
    root = copied("code-llava")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 988097824\n"
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith("README")]
    assert {path.suffix for path in files} >= {".json", ".safetensors", ".jinja"}
    for path in files:
        content = path.read_bytes()
        path.write_text(pointer)
        wanted = [f"{path.relative_to(root)} is a Git LFS pointer, not the file: run `git lfs pull`"]
        if command == "compressing":
            code = step1_raw_text.main(["--text", TEXT, "--model-path", str(root), "--output", f"{root}.npy"])
        else:
            code = inference.main(["--checkpoint", str(root), "--max-tokens", "1", "--device", "cpu"])
        assert_one_error(capsys, code, wanted)
        path.write_bytes(content)


def test_an_lclm_checkpoint_needs_its_config(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied("lclm")
    (root / "model_config.json").unlink()
    code = step1.main(["--model-path", str(root), "--output", str(tmp_path / "out.npy"), "--chunk-size", "4"])
    assert_one_error(capsys, code, ["model_config.json is missing", "LCLM"])


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--chunk-size", "5"], ["encoder_window_size 32 is not a multiple of the chunk size 5", "1, 2, 4, 8, 16, 32"]),
        (["--chunk-size", "0"], ["compression_ratio: expected a whole number of at least 1, got 0"]),
        (["--chunk-size", "4,8"], ["2 chunk sizes for 1 memory spans"]),
        (["--device", "cuda"], ["--device cuda: 0 CUDA devices are visible; use --device cpu or auto"]),
        (["--device", "toaster"], ["--device toaster: expected auto, cpu, cuda or cuda:<number>"]),
        (["--batch-tokens", "0"], ["--batch-tokens must be at least 1, got 0"]),
        (["--max-memory-tokens", "-1", "--truncate-memory"], ["--max-memory-tokens must be at least 1, got -1"]),
        (["--max-memory-tokens", "3"], ["span 0 has 17 encoder tokens, more than the limit of 3", "--truncate-memory"]),
        (["--attn-implementation", "flash_attention_9"], ["/encoder", "flash_attention_9"]),
        (["--format", "safetensors"], ["the name says npy"]),
    ],
)
def test_flags_that_a_checkpoint_cannot_serve(
    flags: list[str],
    wanted: list[str],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "out" / "rows.npy"
    argv = ["--text", TEXT, "--model-path", str(checkpoints["lclm"]), "--output", str(output), *flags]
    assert_one_error(capsys, step1_raw_text.main(argv), wanted)
    assert not output.exists()


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("{tmp}/nowhere/at/all", ["nowhere/at/all does not exist"]),
        ("{tmp}/file", ["file is a file: give the checkpoint's folder"]),
        ("{tmp}/empty", ["empty is not a complete checkpoint", "llm/ embedder/ projectors/ or decoder/"]),
        ("someone/some-model", ["someone/some-model is neither a local folder nor could it be downloaded"]),
    ],
)
def test_nothing_there(path: str, wanted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    argv = ["--text", TEXT, "--model-path", path.format(tmp=tmp_path), "--output", str(tmp_path / "out.npy")]
    assert_one_error(capsys, step1_raw_text.main(argv), wanted)
    assert not (tmp_path / "out.npy").exists()
