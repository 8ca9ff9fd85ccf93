"""LoRA (Hu et al., arXiv 2106.09685) beside the linear layers of a model, with few passes over its activations.

    add_lora(model, rank=32, alpha=64)           # at first it changes nothing
    x W^T + alpha / rank · (x A^T) B^T

Names are peft's (`base_layer`, `lora_A.default`, `lora_B.default`), and so are the initial weights: A as torch draws a
linear layer's, B zero. One autograd function, because passes over activations are what costs: composed of two linear
layers under autocast, every input is copied to float32 and back, and scaling, adding and the sum of gradients each take
a pass of their own; here the second product of each direction is added in place. Shape legend: T rows, i and o widths
in and out, r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Module):
    """A linear layer and its low-rank change.

    Args:
        base: The layer; its weights stay as they are.
        rank: r.
        alpha: Scale times rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False, **place)})
        up = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.zeros_(up.weight)
        self.lora_B = nn.ModuleDict({"default": up})
        self.scale = alpha / rank
        # [T, 1]: rows of the input on which the change acts; None: on all.
        self.acts_on: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output on [..., i]: [..., o]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        down_ri, up_or = self.lora_A["default"].weight, self.lora_B["default"].weight
        weight_oi, bias_o = self.base_layer.weight, self.base_layer.bias
        y = _lora_linear(x.to(dtype), weight_oi, bias_o, down_ri, up_or, self.scale)
        if self.acts_on is None:
            return y
        plain = F.linear(x.to(dtype), weight_oi.to(dtype), None if bias_o is None else bias_o.to(dtype))
        return torch.where(self.acts_on, y, plain)


class _LoraProduct(torch.autograd.Function):
    """x W^T + s (x A^T) B^T for a W that does not learn; products in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_oi: torch.Tensor,
        bias_o: torch.Tensor | None,
        down_ri: torch.Tensor,
        up_or: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        x_Ti = x.reshape(-1, x.shape[-1])
        bias_o = None if bias_o is None else bias_o.to(x.dtype)
        weight_oi, low_ri, high_or = weight_oi.to(x.dtype), down_ri.to(x.dtype), (up_or * scale).to(x.dtype)
        hidden_Tr = x_Ti @ low_ri.T
        y_To = F.linear(x_Ti, weight_oi, bias_o)
        y_To.addmm_(hidden_Tr, high_or.T)
        ctx.save_for_backward(x_Ti, weight_oi, low_ri, high_or, hidden_Tr)
        ctx.scale, ctx.dtypes = scale, (down_ri.dtype, up_or.dtype)
        return y_To.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_Ti, weight_oi, low_ri, high_or, hidden_Tr = ctx.saved_tensors
        (dy,) = gradients
        dy_To = dy.reshape(-1, dy.shape[-1])
        dhidden_Tr = dy_To @ high_or
        dx = None
        if ctx.needs_input_grad[0]:
            dx_Ti = dy_To @ weight_oi
            dx_Ti.addmm_(dhidden_Tr, low_ri)
            dx = dx_Ti.view(*dy.shape[:-1], -1)
        ddown_ri = (dhidden_Tr.T @ x_Ti).to(ctx.dtypes[0])
        dup_or = (dy_To.T @ hidden_Tr).to(ctx.dtypes[1]) * ctx.scale
        return dx, None, None, ddown_ri, dup_or, None


_lora_linear: Callable[..., torch.Tensor] = _LoraProduct.apply


@contextlib.contextmanager
def acting_on(model: nn.Module, rows_T: torch.Tensor | None) -> Iterator[None]:
    """Let a model's LoRA act on some rows [T] bool of a packed row only; None: on all, as without this."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        layer.acts_on = None if rows_T is None else rows_T[:, None]
    try:
        yield
    finally:
        for layer in layers:
            layer.acts_on = None


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Put LoRA weights beside all linear layers of a model but its head, in place; the layers themselves are frozen."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child is not head
    ]
    for parent, name, child in found:
        child.requires_grad_(False)
        setattr(parent, name, LoraLinear(child, rank, alpha))
