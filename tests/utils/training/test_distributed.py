"""Several processes on one step's rows train what one process does: DDP, and FSDP2 with sharded parameters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.processes import run_python
from utils.errors import ConfigError
from utils.files import read_jsonl
from utils.training.checkpoints import newest_checkpoint
from utils.training.config import parse_config
from utils.training.loop import Trainer
from utils.training.sharding import check_shares, shard

Values = Callable[..., dict[str, Any]]
LAUNCHER = "utils/training/configs/accelerate_{}.yaml"


def trained(output: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(output)
    assert newest is not None
    return load_file(newest / "trained.safetensors")


def metrics(output: Path, name: str) -> list[float]:
    return [row[name] for row in read_jsonl(output / "metrics.jsonl")]


def launch(kind: str, values: dict[str, Any], *more: str) -> Path:
    """Train in two processes on the CPU, as the documented command does; returns the run's folder."""
    output = Path(values["output"])
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    command = ["-m", "accelerate.commands.launch", "--config_file", LAUNCHER.format(kind)]
    # Any free port: several launches may run on this machine.
    command += [
        "--main_process_port",
        "0",
        "-m",
        "utils.training.train",
        "--config",
        str(path),
        "--device",
        "cpu",
        *more,
    ]
    ended = run_python(*command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.startswith("done: ")
    assert ended.stdout.count("done") == 1
    return output


def until_step_4(run: Path, copy: Path) -> Path:
    """A copy of a run that ended after 4 steps, two of them in its last stage."""
    shutil.copytree(run, copy)
    for late in sorted((copy / "checkpoints").glob("step_*"))[4:]:
        shutil.rmtree(late)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {f"step_{n:08d}" for n in range(1, 5)}
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(kind: str, run_values: Values, tmp_path: Path) -> None:
    # Two rows a process and step: gradients are kept back once before they are summed.
    pair = {"checkpoint": "toy", "token_columns": True}
    values = run_values(pair=pair, gradient_checkpointing=True, save_minutes=0, keep_checkpoints=9)
    for stage in values["stages"]:
        stage["rows"] = 4
    # The teacher's pass is one more that all processes make together.
    values["stages"][1] |= {"row_tokens": 256, "ratios": 2, "teacher_weight": 0.5}
    one = tmp_path / "one"
    assert Trainer(parse_config({**values, "output": str(one)}), device="cpu").run() == "done"
    two = launch(kind, {**values, "output": str(tmp_path / "two")}, "--no-export")
    # Adam makes a part of a step (1e-3) out of rounding where a gradient is next to nothing.
    torch.testing.assert_close(trained(two), trained(one), rtol=1e-4, atol=1e-4)
    assert metrics(one, "loss") == pytest.approx(metrics(two, "loss"), rel=1e-5)
    assert metrics(one, "grad_norm") == pytest.approx(metrics(two, "grad_norm"), rel=1e-5)

    if kind == "ddp":
        return
    # Gathered and sharded again, optimiser included: from a checkpoint within a stage the same numbers come out.
    resumed = launch(kind, {**values, "output": str(until_step_4(two, tmp_path / "resumed"))}, "--no-export")
    torch.testing.assert_close(trained(resumed), trained(two), rtol=0, atol=0)
    # One process goes on where two were.
    alone = until_step_4(two, tmp_path / "alone")
    assert Trainer(parse_config({**values, "output": str(alone)}), device="cpu").run() == "done"
    torch.testing.assert_close(trained(alone), trained(one), rtol=1e-4, atol=1e-4)


def test_parameters_are_sharded_under_their_names(run_values: Values, gloo: None) -> None:
    trainer = Trainer(parse_config(run_values()), device="cpu")
    before = {name: tuple(p.shape) for name, p in trainer.pair.named_parameters()}
    shard(trainer.pair, torch.device("cpu"))
    parameters = dict(trainer.pair.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == before
    assert {type(p).__name__ for p in parameters.values()} == {"DTensor"}


def test_what_is_not_supported_is_refused(run_values: Values, gloo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(parse_config(run_values()), device="cpu")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ConfigError, match="offloads to the CPU, which is not supported"):
        shard(trainer.pair, torch.device("cpu"))
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="asks for FSDP1: set fsdp_version: 2"):
        shard(trainer.pair, torch.device("cpu"))


def test_deepspeed_is_refused(run_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"asks for DeepSpeed, .* use utils/training/configs/accelerate_fsdp2.yaml"):
        Trainer(parse_config(run_values()), device="cpu")


def test_rows_must_be_shared_evenly(run_values: Values) -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\].rows is 1, which 2 processes cannot share evenly"):
        check_shares(parse_config(run_values()), 2)
