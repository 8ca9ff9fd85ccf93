"""One optimiser step, split over rows and processes, which waits for no device.

A step's rows are shared out among the processes, and every loss is divided by the labels of the whole step: how many
processes and rows a step is split into changes rounding only.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from utils.model.transfer import to_device
from utils.training.config import StageConfig
from utils.training.losses import loss_units
from utils.training.rows import PackedRow
from utils.training.schedule import rate_factor
from utils.training.sharding import full, without_sync
from utils.training.unpacking import unpacked_tokens


def train_step(
    accelerator: Accelerator,
    precision: str,
    wrapped: Any,
    optimizer: torch.optim.Optimizer,
    stage: StageConfig,
    rows: list[PackedRow],
    place: float,
) -> torch.Tensor:
    """One optimiser step; a gradient that is not finite leaves weights and optimiser as they are.

    Args:
        accelerator: Of this process.
        precision: Of the run.
        wrapped: The pair, prepared for the processes there are.
        optimizer: Of the stage.
        stage: What is trained.
        rows: The step's rows, of all processes.
        place: Where the stage's schedule stands.

    Returns:
        The `step_numbers`, float32, on the device, which has not been waited for.
    """
    align, unpack = stage.preset == "align", stage.unpack_weight > 0
    total = sum(loss_units(row, align) for row in rows)
    unpacked = max(1, sum(unpacked_tokens(row.spans) for row in rows))
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = rows[rank::world]
    # For each loss what it is divided by, and its weight; how often the teacher is right is none, and only told.
    columns = [(total, 1.0)]
    columns += [(unpacked, stage.unpack_weight)] if unpack else []
    columns += [(total, stage.teacher_weight), (total, 0.0)] if stage.teacher_weight else []
    device = accelerator.device
    losses = torch.zeros(len(columns), device=device)
    units, weights = to_device(np.array(columns, dtype=np.float32).T.copy(), device)
    for number, row in enumerate(mine):
        last = number == len(mine) - 1
        with contextlib.nullcontext() if last else without_sync(accelerator, wrapped):
            with autocast(device, precision):
                parts = wrapped(row, align, unpack).reshape(-1) / units
            # Distributed wrappers average gradients where a sum is wanted.
            accelerator.backward((parts * weights).sum() * world)
        losses += parts.detach()
    losses = accelerator.reduce(losses, "sum")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = full(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    clip_grads_with_norm_(parameters, stage.clip_norm, norm)
    skipped = 1.0 - (torch.isfinite(norm) & torch.isfinite(losses).all()).float()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate_factor(place, stage)
    # What torch's GradScaler tells the fused kernel: where it is 1 nothing is changed, and nobody has to ask.
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([*losses, norm.float(), skipped])


def step_numbers(stage: StageConfig) -> tuple[str, ...]:
    """What a step gives: `loss` a label (or memory token), with an unpack weight `unpack_loss`, a memory token that it
    covers; with a teacher `teacher_loss`, a label, and `teacher_right`, the part of the labels that are in answers it
    gives right; `grad_norm` before clipping; and `skipped`, 1 if the step was left out."""
    losses = ("unpack_loss",) if stage.unpack_weight > 0 else ()
    taught = ("teacher_loss", "teacher_right") if stage.teacher_weight > 0 else ()
    return ("loss", *losses, *taught, "grad_norm", "skipped")


def autocast(device: torch.device, precision: str) -> Any:
    """Products in bfloat16 where the run says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
