"""Run configurations: presets, strict keys, order of stages, what may change on resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from utils.errors import ConfigError
from utils.files import PROJECT_ROOT
from utils.training.config import PRESETS, StageConfig, load_config, parse_config

# The others beside them are accelerate's.
CONFIGS = sorted((PROJECT_ROOT / "utils/training/configs").glob("[!a]*.yaml"))
TRIALS = sorted((PROJECT_ROOT / "utils/training/configs/trials").glob("*.yaml"))
Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("path", [*CONFIGS, *TRIALS], ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert Path(config.output).name == path.stem
    assert all(set(stage.mixture) <= set(config.data.tasks) for stage in config.stages)


def test_a_file_is_laid_over_its_base(run_values: Values, tmp_path: Path) -> None:
    values = run_values()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    variants = tmp_path / "variants"
    variants.mkdir()
    stages = [{}, {"ratios": 2, "chunk_sizes": {8: 3}}, {"preset": "instruct", "steps": 1, "chunk_sizes": {2: 1}}]
    own = {"base": "../base.yaml", "name": "other", "pair": {"token_columns": True}, "stages": stages}
    (variants / "one.yaml").write_text(yaml.safe_dump(own))
    (variants / "two.yaml").write_text(yaml.safe_dump({"base": "one.yaml", "trackers": ["a"]}))
    base, two = load_config(tmp_path / "base.yaml"), load_config(variants / "two.yaml")
    assert (two.name, two.trackers) == ("other", ("a",))
    assert two.pair == dataclasses.replace(base.pair, token_columns=True)
    assert two.data == base.data
    assert two.stages[0] == base.stages[0]
    sizes = {**base.stages[1].chunk_sizes, 8: 3.0}
    assert two.stages[1] == dataclasses.replace(base.stages[1], ratios=2, chunk_sizes=sizes)
    assert two.stages[2].preset == "instruct"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", r"none\.yaml does not exist \(the base of .*one\.yaml\)"),
        ("base: one.yaml", "based on itself"),
        ("base: [1]", "base: expected a text"),
    ],
)
def test_a_base_that_cannot_be_read_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "one.yaml")


def test_a_stage_starts_from_its_preset_and_the_file_wins(run_values: Values) -> None:
    values = run_values(stages=[{"preset": "encoder", "steps": 3, "chunk_sizes": {4: 1}, "clip_norm": "2e-1"}])
    stage = parse_config(values).stages[0]
    assert stage.learning_rates == PRESETS["encoder"]["learning_rates"]
    assert math.isclose(stage.clip_norm, 0.2)  # YAML 1.1 reads 2e-1 as a text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown key colour"),
        ({"pair": {"checkpoint": "toy", "window_size": 3}}, "pair: unknown key window_size"),
        ({"pair": {}}, "either checkpoint, or encoder and decoder"),
        ({"precision": "int4"}, "precision: expected one of float32, bfloat16, got 'int4'"),
        ({"seed": "one"}, "seed: expected a whole number, got 'one'"),
        ({"seed": True}, "seed: expected a whole number, got True"),
        ({"stages": []}, "a run needs at least one"),
        ({"stages": [{"preset": "warm", "steps": 1}]}, "stages\\[0\\].preset: expected one of align"),
        ({"stages": [{"preset": "adapter", "chunk_sizes": {1: 1}}]}, "key steps is missing"),
        ({"stages": [{"preset": "adapter", "steps": 1, "chunk_sizes": {1: -1}}]}, "weights must not be negative"),
        ({"stages": [{"preset": "align", "steps": 1, "chunk_sizes": {4: 1}}]}, "adapter only, at chunk size 1"),
        (
            {"stages": [{"preset": "adapter", "steps": 1, "chunk_sizes": {4: 1}, "unpack_weight": 1}]},
            "give the unpacker a",
        ),
        (
            {"stages": [{"preset": "adapter", "steps": 1, "chunk_sizes": {4: 1}, "learning_rates": {"unpacker": 1}}]},
            "unpack_weight is 0.0",
        ),
        ({"data": {"folder": "x", "memory_tokens": [9, 3]}}, "expected \\[shortest, longest\\]"),
        ({"data": {"folder": "x", "memory_tokens": [9]}}, "expected 2 values, got 1"),
        ({"data": {"folder": "x", "package_weights": {"python": 0}}}, "package_weights.python: expected at least 1"),
    ],
)
def test_bad_values_are_named(run_values: Values, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(run_values(**changes))


def test_stages_in_the_wrong_order_are_refused(run_values: Values) -> None:
    sizes = {"chunk_sizes": {2: 1}, "steps": 1}
    stages = [{"preset": "decoder", **sizes}, {"preset": "encoder", **sizes}]
    with pytest.raises(ConfigError, match="encoder after decoder; the order is align → adapter"):
        parse_config(run_values(stages=stages))


def test_a_file_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: [1")
    with pytest.raises(ConfigError, match=r"run\.yaml is not YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml does not exist"):
        load_config(tmp_path / "missing.yaml")


def test_what_is_trained_leaves_out_only_what_changes_no_number(run_values: Values) -> None:
    config = parse_config(run_values())
    moved = dataclasses.replace(config, output="elsewhere", threads=2, save_minutes=1.0)
    assert moved.what_is_trained() == config.what_is_trained()
    assert dataclasses.replace(config, seed=1).what_is_trained() != config.what_is_trained()
    assert {f.name for f in dataclasses.fields(StageConfig)} == set(config.what_is_trained()["stages"][0])
