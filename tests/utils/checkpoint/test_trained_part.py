"""A trained part whose manifest or tensors are wrong: one error that names them, before anything is merged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from utils.checkpoint.default.trained_part import TrainedPart
from utils.checkpoint.trained_state import merge_trained_state
from utils.errors import CheckpointError, DatasetError
from utils.files import sha256_file


def write_part(folder: Path, **changes: Any) -> Path:
    """A folder with one tensor; `changes` go into its manifest."""
    save_file({"a.weight": torch.ones(2, 2)}, folder / "part-00.safetensors")
    files = {"part-00.safetensors": sha256_file(folder / "part-00.safetensors")}
    manifest = {"files": files, "lora_scales": {"a": 2.0}, "chunk_sizes": [4], "run": {}, "config": {}, **changes}
    (folder / "trained.json").write_text(json.dumps(manifest))
    return folder


def test_a_whole_part(tmp_path: Path) -> None:
    part = TrainedPart.open(write_part(tmp_path))
    assert part.chunk_sizes == (4,)
    assert part.tensors()["a.weight"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"files": None}, "files"),
        ({"files": ["part-00.safetensors"]}, "files"),
        ({"files": {"../trained.json": "0"}}, "files"),
        ({"files": {"/etc/passwd": "0"}}, "files"),
        ({"files": {"other.safetensors": "0"}}, "missing or damaged"),
        ({"files": {"part-00.safetensors": None}}, "missing or damaged"),
        ({"files": {"x" * 5000: "0"}}, "missing or damaged"),
        ({"lora_scales": [2.0]}, "lora_scales"),
        ({"lora_scales": {"a": "x"}}, "lora_scales"),
        ({"chunk_sizes": 4}, "chunk_sizes"),
        ({"chunk_sizes": [0]}, "chunk_sizes"),
        ({"run": None}, "run"),
        ({"config": []}, "config"),
    ],
)
def test_a_manifest_that_cannot_be_used(changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=wanted):
        TrainedPart.open(write_part(tmp_path, **changes)).tensors()


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_a_manifest_that_is_no_object(text: str, tmp_path: Path) -> None:
    (write_part(tmp_path) / "trained.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trained\.json"):
        TrainedPart.open(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"trained\.json"):
        TrainedPart.open(tmp_path)


A, B = "layer.lora_A.default.weight", "layer.lora_B.default.weight"


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ({A: (1, 3)}, "lora_B is missing"),
        ({A: (1, 3), B: (2, 2)}, r"\[2, 2\] and \[1, 3\]"),
        ({A: (1, 4), B: (2, 1)}, r"\[2, 1\] and \[1, 4\]"),
        ({A: (), B: (2, 1)}, r"\[2, 1\] and \[\]"),
        ({"layer.weight": (3, 2)}, r"expected shape \[2, 3\], got \[3, 2\]"),
        ({"marker_rows.delta": (3, 3)}, r"expected shape \[2, 3\], got \[3, 3\]"),
        ({"marker_rows.delta": (2, 4)}, r"expected shape \[2, 3\], got \[2, 4\]"),
    ],
)
def test_tensors_that_do_not_fit(state: dict[str, tuple[int, ...]], wanted: str) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    model.decoder = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(5, 3))
    tensors = {name: torch.ones(shape) for name, shape in state.items()}
    with pytest.raises(CheckpointError, match=wanted):
        merge_trained_state(model, tensors, {"layer": 2.0}, (0, 1))


def test_lora_without_a_scale() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    with pytest.raises(CheckpointError, match="scale is missing"):
        merge_trained_state(model, {A: torch.ones(1, 3), B: torch.ones(2, 1)}, {"other": 2.0}, ())
