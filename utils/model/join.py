"""Rows joined by NumPy, because waking torch's threads on a busy machine costs more than the copying itself.

A prompt of 16k cached tokens becomes embeddings 4 to 8 times sooner than with `torch.cat` on two shared cores, in a
fifth to an eighth of the CPU time (docs/benchmarks/inference_amd_epyc_202611.md, "Joining rows";
`python -m utils.benchmark join`). With one thread torch is as fast, but it has no such choice for a single call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def join_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` of rows; on the CPU, where no gradient is wanted, in one thread.

    Args:
        parts: Tensors [n, D] of one dtype and device; gradients flow to them.

    Returns:
        A new tensor.
    """
    if parts[0].device.type != "cpu" or any(part.requires_grad for part in parts):
        return torch.cat([*parts])
    joined = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    np.concatenate([_bytes(part.contiguous()) for part in parts], out=_bytes(joined))
    return joined


def _bytes(rows: torch.Tensor) -> np.ndarray:
    # NumPy has no bfloat16.
    return rows.view(torch.uint8).numpy()
