"""Two processes on one step's rows train what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from utils.errors import ConfigError
from utils.files import PROJECT_ROOT, read_jsonl
from utils.training.checkpoints import newest_checkpoint
from utils.training.config import parse_config
from utils.training.loop import Trainer, _check_shares

Values = Callable[..., dict[str, Any]]


def trained(output: str) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(output)
    assert newest is not None
    return load_file(newest / "trained.safetensors")


@pytest.mark.slow
def test_two_processes_are_one(run_values: Values, tmp_path: Path) -> None:
    values = run_values()
    for stage in values["stages"]:
        stage["rows"] = 2
    assert Trainer(parse_config({**values, "output": str(tmp_path / "one")}), device="cpu").run() == "done"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "utils.training.train", "--config", str(path), "--device", "cpu", "--no-export"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("done: ")
    assert ended.stdout.count("done") == 1
    one, two = trained(str(tmp_path / "one")), trained(str(tmp_path / "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in read_jsonl(tmp_path / run / "metrics.jsonl")] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_must_be_shared_evenly(run_values: Values) -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\].rows is 1, which 2 processes cannot share evenly"):
        _check_shares(parse_config(run_values()), 2)
