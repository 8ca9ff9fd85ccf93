"""The trials' configurations: each runs, differs from their base in what it tries, and starts from the shipped part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from utils.checkpoint.default.trained_part import TrainedPart
from utils.files import PROJECT_ROOT
from utils.training.config import load_config
from utils.training.parts import lora_scales
from utils.training.plain import read_layers
from utils.training.train import main

TRIALS = PROJECT_ROOT / "utils/training/configs/trials"
NAMES = sorted(path.stem for path in TRIALS.glob("*.yaml"))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that every task finds something in."""
    folder = tmp_path_factory.mktemp("code")
    for number in range(12):
        text = "".join(
            f"def area_{number}_{n}(width, scale={n}):\n    # the sides are in metres {n}\n    half = width / {n + 2}\n"
            f"    return half * {number}{n}\n\n\nLIMIT_{n} = {number}{n}0\n\n\n"
            for n in range(12)
        )
        (folder / f"part_{number}.py").write_text(text)
    return folder


def on_the_toy(name: str, code: Path, folder: Path) -> Path:
    """A trial with the toy pair in the embedded one's place, and few short examples, none of chat: a toy cannot."""
    values: dict[str, Any] = read_layers(TRIALS / f"{name}.yaml")
    values["pair"] = {"checkpoint": "toy", "token_columns": values["pair"].get("token_columns", False)}
    values["threads"] = 1
    data, (stage,) = values["data"], values["stages"]
    data |= {"folder": str(folder / "data"), "source": str(code), "package_weights": {}, "max_files": None}
    data |= {"chars_per_token": 1, "memory_tokens": [100, 200], "tasks": dict.fromkeys(data["tasks"], 4)}
    del data["tasks"]["chat"], stage["mixture"]["chat"]
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(on_the_toy(name, code, tmp_path)), "--dry-run", "--json", "--device", "cpu"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["steps"] == 200
    assert stage["labels"] > 0


def test_each_tries_one_thing() -> None:
    base = load_config(TRIALS / "base.yaml")
    tried: dict[str, list[str]] = {}
    for name in NAMES:
        config = load_config(TRIALS / f"{name}.yaml")
        changed = []
        for part, before in ((config.stages[0], base.stages[0]), (config.data, base.data), (config.pair, base.pair)):
            fields = [f.name for f in dataclasses.fields(part) if getattr(part, f.name) != getattr(before, f.name)]
            changed += [field for field in fields if field != "folder"]
        tried[name] = sorted(changed)
    assert tried == {
        "base": [],
        "ratios": ["ratios"],
        "teacher": ["teacher_weight"],
        "token_columns": ["token_columns"],
        "lengths": ["lengths", "memory_tokens"],
        "strings": ["mixture", "tasks"],
        "scattered": ["scattered"],
        "all": sorted([field for name in NAMES for field in tried[name] if name != "all"]),
    }


def test_they_go_on_from_the_shipped_part() -> None:
    for name in NAMES:
        config = load_config(TRIALS / f"{name}.yaml")
        assert config.pair.trained is not None
        assert lora_scales(config) == TrainedPart.open(PROJECT_ROOT / config.pair.trained).lora_scales
