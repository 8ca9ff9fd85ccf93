"""Trained tensors into the pair that they were trained from; names are those of `CodeLLaVAModel`'s parameters.

LoRA pairs stand in place of the matrix that they change, as peft names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from utils.errors import CheckpointError

MARKER_DELTA = "marker_rows.delta"
_LORA_A = re.compile(r"(?P<layer>.+)\.lora_A\.\w+\.weight")


def merge_trained_state(
    model: Any,
    state: Mapping[str, torch.Tensor],
    lora_scales: Mapping[str, float],
    marker_ids: Sequence[int],
) -> set[str]:
    """Write a trained state into a pair, in the pair's own dtype.

    Args:
        model: A `CodeLLaVAModel`, or any module with the same names; changed in place.
        state: Trained tensors.
        lora_scales: Prefix of parameter names → what B·A is multiplied with before it is added.
        marker_ids: Rows of the decoder's table that `MARKER_DELTA` is added to.

    Returns:
        Names that the module has no place for.

    Raises:
        CheckpointError: A tensor of another shape, or a LoRA matrix without its other half or its scale.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unused = set()
    with torch.no_grad():
        for name, tensor in state.items():
            if name == MARKER_DELTA or ".lora_B." in name:
                continue
            lora = _LORA_A.fullmatch(name)
            target = parameters.get(f"{lora['layer']}.weight" if lora else name)
            if target is None:
                unused.add(name)
                continue
            value = tensor.to(target.device).float()
            if lora:
                scale = next((s for prefix, s in lora_scales.items() if name.startswith(prefix)), None)
                b = state.get(name.replace(".lora_A.", ".lora_B."))
                if scale is None or b is None:
                    lacking = "scale" if scale is None else "lora_B"
                    raise CheckpointError(f"trained tensor {name}: its {lacking} is missing")
                rank = next(iter(value.shape), 0)
                if list(b.shape) != [target.shape[0], rank] or list(value.shape) != [rank, target.shape[-1]]:
                    raise CheckpointError(
                        f"trained tensor {name}: LoRA of shapes {list(b.shape)} and {list(value.shape)} does not fit a "
                        f"matrix of shape {list(target.shape)}"
                    )
                # The state may also hold the matrix that it changes, as whole-model states do.
                value = state.get(f"{lora['layer']}.weight", target).to(value) + scale * (b.to(value) @ value)
            elif f"{name.removesuffix('.weight')}.lora_A.default.weight" in state:
                continue
            if value.shape != target.shape:
                expected, got = list(target.shape), list(value.shape)
                raise CheckpointError(f"trained tensor {name}: expected shape {expected}, got {got}")
            target.copy_(value)
        # Last, for the table itself may be part of the state.
        if MARKER_DELTA in state:
            table = model.decoder.get_input_embeddings().weight
            if (got := list(state[MARKER_DELTA].shape)) != [len(marker_ids), table.shape[1]]:
                expected = [len(marker_ids), table.shape[1]]
                raise CheckpointError(f"trained tensor {MARKER_DELTA}: expected shape {expected}, got {got}")
            for row, marker in zip(state[MARKER_DELTA], marker_ids, strict=True):
                table[marker] += row.to(table)
    return unused
