"""What a run will cost, before it runs: parameters and FLOPs counted, memory reckoned, time measured on two steps.

A floating-point operation is a multiplication or an addition. A token costs 2 per weight forward; backward costs 2 per
weight for the gradient of activations and 2 per weight that learns; computing activations again costs 2 more.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from utils.training.config import StageConfig, TrainConfig
from utils.training.loop import Trainer
from utils.training.packing import PackedRow

_PROBED_STEPS = 2
_GB = 1e9
# Bytes that AdamW keeps beside a float32 weight: gradient and two moments.
_LEARNING_BYTES = 12
# Activations kept a token and layer, in units of the width: inputs of the matrix products, of norms and of attention.
_ACTIVATIONS = 20


def estimate_run(config: TrainConfig, device: str = "auto") -> dict[str, Any]:
    """Estimate a run; its output folder is left alone, its data are built if they are not there yet.

    Returns:
        JSON values: parameters by part, and for each stage FLOPs, memory and time.
    """
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(dataclasses.replace(config, output=str(Path(output))), device=device)
        total = sum(parameter.numel() for parameter in trainer.pair.parameters())
        stages = [_estimate_stage(trainer, number) for number in range(len(config.stages))]
    return {
        "name": config.name,
        "device": str(trainer.accelerator.device),
        "parameters": total,
        "stages": stages,
        "hours": sum(stage["hours"] for stage in stages),
    }


def describe(estimate: dict[str, Any]) -> str:
    """An estimate as a table."""
    head = ("stage", "steps", "learns (M)", "rows/step", "labels/step", "TFLOP/step", "memory (GB)", "s/step", "hours")
    lines = [
        f"{estimate['name']} on {estimate['device']}: {estimate['parameters'] / 1e6:.1f} M parameters, "
        f"about {estimate['hours']:.2f} hours in all (measured on {_PROBED_STEPS} steps a stage)",
        "  ".join(f"{title:>12}" for title in head),
    ]
    for stage in estimate["stages"]:
        values = (
            stage["preset"],
            stage["steps"],
            f"{stage['learning_parameters'] / 1e6:.2f}",
            f"{stage['decoder_rows']:.0f}",
            f"{stage['labels']:.0f}",
            f"{stage['flops'] / 1e12:.3f}",
            f"{stage['memory_bytes'] / _GB:.2f}",
            f"{stage['seconds']:.2f}",
            f"{stage['hours']:.2f}",
        )
        lines.append("  ".join(f"{value:>12}" for value in values))
    return "\n".join(lines)


def _estimate_stage(trainer: Trainer, number: int) -> dict[str, Any]:
    stage = trainer.config.stages[number]
    packer = trainer.packer(number)
    wrapped, optimizer = trainer.prepare(stage)
    # At a learning rate of nothing: the probe must not change what later stages start from.
    for group in optimizer.param_groups:
        group["peak"] = 0.0
        group["weight_decay"] = 0.0
    steps, seconds = [], []
    for step in range(1 + _PROBED_STEPS):
        rows = trainer.step_rows(packer, stage)
        began = time.monotonic()
        trainer.optimize(wrapped, optimizer, stage, rows, step)
        seconds.append(time.monotonic() - began)
        steps.append(rows)
    # The first step pays for allocation and autotuning.
    mean_seconds = sum(seconds[1:]) / _PROBED_STEPS
    flat = [row for rows in steps for row in rows]
    learning = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return {
        "preset": stage.preset,
        "steps": stage.steps,
        "learning_parameters": learning,
        "decoder_rows": sum(len(row.input_ids) for row in flat) / len(steps),
        "memory_tokens": sum(row.memory_tokens for row in flat) / len(steps),
        "labels": sum(row.num_labels for row in flat) / len(steps),
        "flops": _flops(trainer, stage, flat) / len(steps),
        "memory_bytes": _memory_bytes(trainer, stage, flat, learning),
        "seconds": mean_seconds,
        "hours": mean_seconds * stage.steps / 3600,
    }


def _flops(trainer: Trainer, stage: StageConfig, rows: list[PackedRow]) -> float:
    pair = trainer.pair
    align = stage.preset == "align"
    encoder, decoder = pair.memory_encoder.chunker.encoder, pair.decoder
    memory = sum(row.memory_tokens for row in rows)
    latents = memory if align else sum(span.num_latents for row in rows for span in row.spans)
    again = 1 if trainer.config.gradient_checkpointing else 0
    encoder_learns = 0 if align or "encoder" not in stage.learning_rates else 1
    total = memory * (2 + (2 + 2 * again) * encoder_learns) * _size(encoder) + memory * encoder_learns * 2 * _learns(
        encoder
    )
    total += latents * 6 * sum(p.numel() for p in pair.memory_encoder.adapter.parameters())
    if align:
        return total
    head = decoder.get_output_embeddings().weight.numel()
    body = sum(len(row.input_ids) for row in rows)
    total += body * ((4 + 2 * again) * _size(decoder) + 2 * _learns(decoder))
    return total + sum(row.num_labels for row in rows) * 4 * head


def _memory_bytes(trainer: Trainer, stage: StageConfig, rows: list[PackedRow], learning: int) -> float:
    pair = trainer.pair
    weights = sum(p.numel() * p.element_size() for p in pair.parameters())
    width_bytes = 2 if trainer.config.precision == "bfloat16" else 4
    activations = 0.0
    if stage.preset != "align":
        longest = max(len(row.input_ids) for row in rows)
        memory = max(row.memory_tokens for row in rows)
        for model, tokens in ((pair.decoder, longest), (pair.memory_encoder.chunker.encoder, memory)):
            kept = 1 if trainer.config.gradient_checkpointing else _ACTIVATIONS
            layers = model.config.num_hidden_layers
            activations += tokens * layers * kept * model.config.hidden_size * width_bytes
        labels = max(row.num_labels for row in rows)
        # Logits in float32 and their gradient, at most one piece of the head at a time.
        activations += min(labels, 2048) * pair.decoder.get_output_embeddings().weight.shape[0] * 8
    return weights + learning * _LEARNING_BYTES + activations


def _size(model: Any) -> int:
    """Weights of a model's layers, without its table and head."""
    table = model.get_input_embeddings().weight
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = {id(table), id(head.weight) if head is not None else id(table)}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def _learns(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
