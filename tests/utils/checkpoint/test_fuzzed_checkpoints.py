"""Checkpoints with one thing wrong at a random place: they work, or give one error of ours; never another exception."""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import GOLDEN
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.errors import CodeLlavaError
from utils.inference.inference import load_model

TEXT = "Explain <|memory_start|>def f(): return 1<|memory_end|>"
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 7.5, 2**31, 10**9, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "x",
    "7", "../../x", "/etc/passwd", "a/b", "\ud800", "\x00", "x" * 5000, [], [[]], [None], [0], {}, {"": None},
    {"a": [{}]}, "float8_e4m3fn", "bfloat16",
]  # fmt: skip
KEYS: list[str] = [
    "auto_map", "attn_implementation", "_attn_implementation", "quantization_config", "transformers_weights",
    "tie_word_embeddings", "architectures", "tokenizer_class", "chat_template", "vocab_size", "num_labels", "id2label",
    "dtype", "torch_dtype", "rope_scaling", "rope_parameters", "adapter_type", "num_adapter_layers", "pooling",
    "is_decoder", "extra_special_tokens", "added_tokens_decoder", "model_input_names", "_name_or_path", "pad_token",
    "truncation_side", "padding", "truncation", "rank_pattern", "alpha_pattern", "layer_replication",
    "modules_to_save", "use_dora", "text_config", "fast_tokenizer_files", "cache_implementation", "eos_token_id",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value; of long containers the first few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items[:40]:
        yield value, key
        yield from places(inner)


def damage_json(path: Path, chance: random.Random) -> str:
    """Change one thing of a JSON file; returns what."""
    value = json.loads(path.read_text())
    found = list(places(value))
    kind = chance.choice(["replace", "replace", "replace", "add", "delete", "whole"])
    odd = chance.choice(ODD)
    if kind == "whole" or not found:
        value, what = odd, f"all = {odd!r:.40}"
    elif kind == "add":
        key = chance.choice(KEYS)
        value, what = {**value, key: odd}, f"{key} = {odd!r:.40}"
    else:
        container, key = chance.choice(found)
        what = f"{key!r}: {kind} {odd!r:.40}"
        if kind == "delete":
            del container[key]
        else:
            container[key] = odd
    path.unlink()
    path.write_text(json.dumps(value))
    return what


def damage_bytes(path: Path, chance: random.Random) -> str:
    """Cut a file, or write other bytes over a few of its first."""
    data = bytearray(path.read_bytes())
    if chance.random() < 0.4:
        data, what = data[: chance.randrange(len(data))], "cut"
    else:
        for _ in range(chance.choice([1, 1, 4])):
            data[chance.randrange(min(len(data), 4000))] = chance.randrange(256)
        what = "other bytes"
    path.unlink()
    path.write_bytes(data)
    return what


def run_damaged(source: Path, folder: Path, seed: int) -> tuple[str, BaseException | None]:
    """Damage a copy of a checkpoint and use it; returns what was damaged, and what was raised."""
    chance = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    # Links are enough: a file that is changed becomes one of its own.
    shutil.copytree(source, folder, copy_function=os.link, ignore=shutil.ignore_patterns("expected"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    settings = [path for path in files if path.suffix == ".json"]
    if chance.random() < 0.75:
        path = chance.choice(settings)
        what = damage_json(path, chance)
    else:
        path = chance.choice(files)
        what = damage_bytes(path, chance)
    try:
        use(folder)
    except BaseException as error:
        return f"{path.relative_to(folder)}: {what}", error
    return f"{path.relative_to(folder)}: {what}", None


def use(folder: Path) -> None:
    """Every way in: the fingerprint, the parts that compressing opens, the whole model."""
    files = find_checkpoint(folder, None if (folder / "model_config.json").exists() else 8)
    assert len(files.fingerprint) == 64
    chunk_size = files.config.chunk_size
    compressor = Compressor.load(folder, settings=ON_CPU, chunk_size=chunk_size)
    compressor.compress([compressor.parse_raw(TEXT)])
    model, _, processor = load_model(folder, device="cpu", chunk_size=chunk_size)
    prompt = processor.parse_chat([{"role": "user", "content": TEXT}])
    model.generate([prompt], max_new_tokens=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of both layouts, and one with LoRA weights."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("fuzzed")
    lora = shutil.copytree(GOLDEN / "code_llava_c8", root / "lora")
    base = root / "base"
    (lora / "embedder").rename(base)
    (lora / "embedder").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, lora / "embedder" / name)
    torch.manual_seed(0)
    names = [f"base_model.model.layers.{layer}.self_attn.q_proj.lora" for layer in (0, 1)]
    state = {f"{name}_A.weight": torch.randn(2, 48) for name in names}
    state |= {f"{name}_B.weight": torch.randn(32, 2) for name in names}
    save_file(state, lora / "embedder" / "adapter_model.safetensors")
    settings = {
        "base_model_name_or_path": str(base),
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
    }
    (lora / "embedder" / "adapter_config.json").write_text(json.dumps(settings))
    return [GOLDEN / "code_llava_c8", GOLDEN / "lclm_mean_r4_w32", lora]


def check(sources: list[Path], folder: Path, seeds: range) -> None:
    wrong = []
    for seed in seeds:
        what, error = run_damaged(sources[seed % len(sources)], folder, seed)
        if error is not None and not isinstance(error, CodeLlavaError):
            last = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"seed {seed}: {what}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})")
    assert wrong == []


def test_the_sources_work(sources: list[Path]) -> None:
    for source in sources:
        use(source)


@pytest.mark.filterwarnings("ignore")
def test_a_few_damages(sources: list[Path], tmp_path: Path) -> None:
    check(sources, tmp_path / "damaged", range(6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damages(sources: list[Path], tmp_path: Path) -> None:
    check(sources, tmp_path / "damaged", range(6, 1000))
