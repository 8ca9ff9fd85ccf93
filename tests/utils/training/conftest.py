"""A tiny run: the toy pair, two toy tasks, two short stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from utils.training.config import DataConfig, TrainConfig, parse_config
from utils.training.data.build import build_examples

TASKS = {"copy_symbols": 60, "find_symbol": 60}


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL files of the toy tasks."""
    folder = tmp_path_factory.mktemp("toy_data")
    data = DataConfig(folder=str(folder), tasks=TASKS, memory_tokens=(4, 12), chars_per_token=1, source="symbols")
    build_examples(data)
    return folder


@pytest.fixture
def run_values(toy_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Plain values of a run of a few steps, as a YAML file would hold them; arguments replace top-level keys."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "output": str(tmp_path / "run"),
            "pair": {"checkpoint": "toy"},
            "threads": 1,
            "log_every": 1,
            "data": {"folder": str(toy_data)},
            "decoder_tuning": {"method": "lora", "rank": 4, "alpha": 8},
            "stages": [
                {"preset": "align", "steps": 2, "row_tokens": 128},
                {
                    "preset": "decoder",
                    "steps": 4,
                    "row_tokens": 128,
                    "rows": 2,
                    "chunk_sizes": {1: 1, 2: 1, 4: 1},
                    "unpack_weight": 0.5,
                    "learning_rates": dict.fromkeys(("adapter", "markers", "encoder", "decoder", "unpacker"), 1e-3),
                    "warmup_steps": 1,
                },
            ],
            **changes,
        }

    return make


@pytest.fixture
def gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, launched as with an FSDP2 configuration."""
    import torch.distributed

    monkeypatch.setenv("FSDP_VERSION", "2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def run_config(run_values: Callable[..., dict[str, Any]]) -> Callable[..., TrainConfig]:
    """The same, parsed."""
    return lambda **changes: parse_config(run_values(**changes))
