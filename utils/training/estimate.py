"""What a run will cost, before it runs: parameters and FLOPs counted, memory reckoned, time measured on two steps.

Operations are those of `utils.training.flops`, whose counts are tested against torch's.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from utils.model.prompt import num_latents
from utils.training.config import StageConfig, TrainConfig
from utils.training.flops import PairCost, layer_matrices
from utils.training.loop import Trainer
from utils.training.rows import PackedRow

_PROBED_STEPS = 2
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
        trainer = Trainer(dataclasses.replace(config, output=output), device=device)
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
    columns = {
        "stage": lambda stage: stage["preset"],
        "steps": lambda stage: stage["steps"],
        "learns (M)": lambda stage: f"{stage['learning_parameters'] / 1e6:.2f}",
        "rows/step": lambda stage: f"{stage['decoder_rows']:.0f}",
        "labels/step": lambda stage: f"{stage['labels']:.0f}",
        "TFLOP/step": lambda stage: f"{stage['flops'] / 1e12:.3f}",
        "memory (GB)": lambda stage: f"{stage['memory_bytes'] / 1e9:.2f}",
        "s/step": lambda stage: f"{stage['seconds']:.2f}",
        "hours": lambda stage: f"{stage['hours']:.2f}",
    }
    lines = [
        f"{estimate['name']} on {estimate['device']}: {estimate['parameters'] / 1e6:.1f} M parameters, "
        f"about {estimate['hours']:.2f} hours in all (measured on {_PROBED_STEPS} steps a stage)",
        "  ".join(f"{title:>12}" for title in columns),
    ]
    lines += ["  ".join(f"{show(stage):>12}" for show in columns.values()) for stage in estimate["stages"]]
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

    def mean(values: Iterable[int]) -> float:
        return sum(values) / len(steps)

    return {
        "preset": stage.preset,
        "steps": stage.steps,
        "learning_parameters": learning,
        "decoder_rows": mean(len(row.input_ids) for row in flat),
        "memory_tokens": mean(row.memory_tokens for row in flat),
        "labels": mean(row.num_labels for row in flat),
        "flops": step_flops(trainer, stage, flat) / len(steps),
        "memory_bytes": _memory_bytes(trainer, stage, flat, learning),
        "seconds": mean_seconds,
        "hours": mean_seconds * stage.steps / 3600,
    }


def step_flops(trainer: Trainer, stage: StageConfig, rows: list[PackedRow]) -> int:
    """Operations of a forward and a backward pass over packed rows, with what the stage trains."""
    pair = trainer.pair
    encoder = pair.memory_encoder.chunker.encoder
    cost = PairCost.of(pair.memory_encoder, pair.decoder)
    spans = [span for row in rows for span in row.spans]
    align = stage.preset == "align"
    # Aligning gives each memory token a latent of its own.
    sizes = [(len(span.token_ids), 1 if align else span.chunk_size) for span in spans]
    encoded = [(len(span.token_ids), 1 if align else span.chunk_size) for row in rows for span in row.encoded]
    windows = [rows for length, size in encoded for rows in cost.window_lengths([length], size)]
    latents = [num_latents(length, size) for length, size in sizes]
    again, causal = trainer.config.gradient_checkpointing, cost.config.causal
    total = cost.adapter.training_flops(latents, causal=False, learning_weights=cost.adapter.matrix_weights)
    if align or not stage.learning_rates.get("encoder"):
        total += cost.encoder.forward_flops(windows, causal=causal)
    else:
        learning = _learning_matrices(encoder)
        total += cost.encoder.training_flops(windows, causal=causal, learning_weights=learning, recompute=again)
    if align:
        return total
    for row in rows:
        if row.teacher is not None:
            # The teacher's logits say where it is right, and again what it says; the student's are computed once more
            # than for the next-token loss, there and back.
            logits = len(row.teacher.labels) + 3 * row.num_labels
            total += cost.decoder.forward_flops(row.teacher.lengths, causal=True, logits=logits)
    return total + cost.decoder.training_flops(
        [length for row in rows for length in row.lengths],
        causal=True,
        learning_weights=_learning_matrices(pair.decoder),
        recompute=again,
        logits=sum(row.num_labels for row in rows),
    )


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
        vocabulary = pair.decoder.get_output_embeddings().weight.shape[0]
        activations += min(labels, pair.head_rows) * vocabulary * 8
        if stage.teacher_weight:
            # What teacher and student say, their logarithms, and a gradient.
            activations += min(labels, pair.head_rows // 3) * vocabulary * 20
    return weights + learning * _LEARNING_BYTES + activations


def _learning_matrices(model: Any) -> int:
    return sum(parameter.numel() for parameter in layer_matrices(model) if parameter.requires_grad)
