"""Torch's counter of operations, the same with every torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def counter() -> FlopCounterMode:
    """A counter of matrix products and attention; torch before 2.15 passes over the CPU's fused attention."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            # Two products forward; five backward, for the scores are computed again.
            _FUSED: lambda query, key, *_, **__: 2 * _product(query, key),
            # Rotary tables are outer products of positions and frequencies, in some transformers as matrix products.
            torch.ops.aten.bmm: lambda a, b, *_, **__: 2 * a[0] * a[1] * a[2] * b[2] if a[2] > 1 else 0,
            _FUSED_BACKWARD: lambda _, query, key, *__, **___: 5 * _product(query, key),
        },
    )


def _product(query: Any, key: Any) -> int:
    """Operations of one product between all queries and all keys, from their shapes [b, h, l, K]."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * width
