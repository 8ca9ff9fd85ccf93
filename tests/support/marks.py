"""Marks that tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def requires_gpu(test: Any) -> Any:
    """Mark a test as `gpu` and skip it on a machine without CUDA."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))
