"""RMSNorm as one kernel where transformers' own takes eight, forward and backward each.

    use_fused_norms(pair)        # before it moves to its device; on a CPU nothing changes

transformers replaces its norms through the package `kernels`, which fetches them from a hub. Torch has one of its own
for CUDA (`torch.nn.functional.rms_norm`). It rounds to bfloat16 once, where transformers' Llama and Qwen round twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def use_fused_norms(model: nn.Module) -> int:
    """Let the RMSNorms of a model run as one kernel each wherever it runs on CUDA.

    A module is one if it is called so and computes what torch's function computes: norms that add one to their weight,
    say, stay as they are.

    Args:
        model: On the CPU; changed in place, its parameters and their names stay.

    Returns:
        How many norms there are.
    """
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    kinds: dict[Any, Any] = {kind: _fused(kind) for kind in {type(norm) for norm in norms}}
    for norm in norms:
        # By class, not by a function on the module: copies of the module then use their own weights.
        norm.__class__ = kinds[type(norm)]
    return len(norms)


def _is_rms_norm(module: Any) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight = module.weight
    with torch.no_grad():
        row = torch.linspace(-2, 3, weight.shape[-1], dtype=weight.dtype)[None]
        expected = F.rms_norm(row, [row.shape[-1]], weight, module.variance_epsilon)
        return torch.allclose(module(row).float(), expected.float(), rtol=2e-2, atol=1e-3)


def _fused(kind: Any) -> Any:
    class FusedRMSNorm(kind):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if not hidden.is_cuda or hidden.dtype != self.weight.dtype:
                return super().forward(hidden)
            # Autocast would compute it in float32, and whatever comes next would turn that back.
            with torch.autocast("cuda", enabled=False):
                return F.rms_norm(hidden, [hidden.shape[-1]], self.weight, self.variance_epsilon)

    return FusedRMSNorm
