"""The training benchmark on the toy: what it counts is right, and it really trains both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

STAGES = """
- {preset: align, steps: 2, row_tokens: 128}
- preset: decoder
  steps: 2
  row_tokens: 128
  rows: 2
  chunk_sizes: {1: 1, 2: 1}
  learning_rates: {adapter: 1e-3, markers: 1e-3, encoder: 1e-3, decoder: 1e-3}
"""


@pytest.mark.slow
def test_training_beside_the_hf_trainer(result_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "pair": {"checkpoint": "toy"},
        "threads": 1,
        "data": {"folder": str(tmp_path / "data"), "source": "symbols", "chars_per_token": 1, "memory_tokens": [4, 12]},
        "decoder_tuning": {"method": "lora", "rank": 4, "alpha": 8},
        "stages": yaml.safe_load(STAGES),
    }
    values["data"]["tasks"] = {"copy_symbols": 60}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    flags = ["--config", config, "--device", "cpu", "--steps", 2, "--repeats", 1]
    result = result_of("training", *flags, "--output", tmp_path / "out")
    stages = result["stages"]
    assert list(stages) == ["stage 0 (align)", "stage 1 (decoder)", "HF Trainer, plain text"]
    assert stages["HF Trainer, plain text"]["of_hf_trainer"] == 1
    assert stages["HF Trainer, plain text"]["runs"][0]["tokens"] == 2 * 2 * 128
    for stage in stages.values():
        (run,) = stage["runs"]
        assert stage["tokens_per_s"] == pytest.approx(run["tokens"] / run["seconds"], abs=1e-3)
        assert stage["of_hf_trainer"] > 0
        assert run["peak_bytes"] > 100 << 20
    assert not (tmp_path / "run").exists()
