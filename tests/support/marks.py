"""Marks that tests share."""

from __future__ import annotations

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
