"""Training of a pair beside the HF Trainer on plain text: the same decoder, rows, LoRA, precision and machine.

A pair's step does more than a decoder's (it encodes its memory) and less (only answers have a loss), so operations a
second are what compares: `utils.training.flops` counts both. Stages and HF Trainer take turns, in fresh processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers

from utils.benchmark.measure import MIB, forget_peak, in_a_fresh_process, markdown_table, peak_bytes
from utils.errors import ConfigError
from utils.training.config import TrainConfig, load_config
from utils.training.estimate import step_flops
from utils.training.flops import TransformerCost, layer_matrices
from utils.training.loop import Trainer
from utils.training.pairs import starting_pair

HF_TRAINER = "HF Trainer, plain text"


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    if min(args.steps, args.repeats) < 1:
        raise ConfigError("--steps and --repeats must be at least 1")
    config = load_config(args.config)
    names = [f"stage {number} ({stage.preset})" for number, stage in enumerate(config.stages)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in [*names, HF_TRAINER]}
    for _ in range(args.repeats):
        for number, name in enumerate(names):
            runs[name].append(in_a_fresh_process(train_pair, args.config, args.device, number, args.steps))
        runs[HF_TRAINER].append(in_a_fresh_process(train_with_hf, args.config, args.device, args.steps))
    stages = {name: _figures(mine, runs[HF_TRAINER]) for name, mine in runs.items()}
    rows = [
        (
            name,
            f"{figures['tokens_per_s']:.0f}",
            f"{figures['gflop_per_s']:.0f}",
            f"{figures['of_hf_trainer']:.2f}",
            f"{figures['peak_mib']:.0f}",
            f"{figures['peak_of_hf_trainer']:.2f}",
        )
        for name, figures in stages.items()
    ]
    header = ("training", "tokens/s", "GFLOP/s", "× HF Trainer", "peak MiB", "× HF Trainer's")
    return markdown_table(header, rows), {"stages": stages, "precision": config.precision}


def _figures(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; ratios to the HF Trainer's run of the same round."""
    speeds, their_speeds = ([r["flops"] / r["seconds"] for r in runs] for runs in (mine, theirs))
    peaks, their_peaks = ([r["peak_bytes"] for r in runs] for runs in (mine, theirs))
    return {
        "tokens_per_s": statistics.median(r["tokens"] / r["seconds"] for r in mine),
        "gflop_per_s": statistics.median(speeds) / 1e9,
        "of_hf_trainer": statistics.median(a / b for a, b in zip(speeds, their_speeds, strict=True)),
        "peak_mib": statistics.median(peaks) / MIB,
        "peak_of_hf_trainer": statistics.median(a / b for a, b in zip(peaks, their_peaks, strict=True)),
        "runs": mine,
    }


def train_pair(path: str, device: str, number: int, steps: int) -> dict[str, Any]:
    """Some steps of a stage, from the weights that the run begins with.

    Returns:
        `seconds`, `tokens` (decoder rows and memory tokens) and `flops` of the counted steps, `peak_bytes` of all.
    """
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(dataclasses.replace(load_config(path), output=output), device=device)
        stage = trainer.config.stages[number]
        packer = trainer.packer(number)
        wrapped, optimizer = trainer.prepare(stage)
        forget_peak()
        seconds, rows = 0.0, []
        for step in range(1 + steps):
            began = time.perf_counter()
            mine = trainer.step_rows(packer, stage)
            # Reading the loss waits for the device.
            trainer.optimize(wrapped, optimizer, stage, mine, step)
            if step:
                seconds += time.perf_counter() - began
                rows += mine
        return {
            "seconds": seconds,
            "tokens": sum(len(row.input_ids) + row.memory_tokens for row in rows),
            "flops": step_flops(trainer, stage, rows),
            "peak_bytes": peak_bytes(trainer.accelerator.device),
        }


def train_with_hf(path: str, device: str, steps: int) -> dict[str, Any]:
    """As `train_pair`, with the HF Trainer: the run's decoder on full rows of plain tokens, all of them with a loss.

    Tokens are random: what a step costs does not depend on them.
    """
    config = load_config(path)
    stage = config.stages[-1]
    if config.threads:
        torch.set_num_threads(config.threads)
    decoder, learning = _plain_decoder(config)
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, ((1 + steps) * stage.rows, stage.row_tokens))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as output:
        settings = transformers.TrainingArguments(
            output_dir=output,
            max_steps=1 + steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=stage.rows,
            gradient_checkpointing=config.gradient_checkpointing,
            learning_rate=1e-5,
            bf16=config.precision == "bfloat16",
            use_cpu=device == "cpu" or not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
        )
        rows: Any = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model=decoder, args=settings, train_dataset=rows, callbacks=[clock])
        forget_peak()
        trainer.train()
    lengths = [stage.row_tokens] * steps * stage.rows
    return {
        "seconds": clock.times[-1] - clock.times[1],
        "tokens": sum(lengths),
        "flops": TransformerCost.of(decoder).training_flops(
            lengths,
            causal=True,
            learning_weights=learning,
            recompute=config.gradient_checkpointing,
            logits=sum(lengths),
        ),
        "peak_bytes": peak_bytes(trainer.args.device),
    }


class _Clock(transformers.TrainerCallback):
    """Notes when each step and the end come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *arguments: Any, **values: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, *arguments: Any, **values: Any) -> None:
        self.times.append(time.perf_counter())


def _plain_decoder(config: TrainConfig) -> tuple[Any, int]:
    """The run's decoder with its LoRA, and how many weights of its layers learn."""
    decoder: Any = starting_pair(config.pair, config.seed)[0].decoder
    decoder.to(torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    if config.decoder_tuning.method == "lora":
        from peft import LoraConfig, get_peft_model

        tuning = config.decoder_tuning
        lora = LoraConfig(r=tuning.rank, lora_alpha=int(tuning.alpha), target_modules="all-linear")
        decoder = get_peft_model(decoder, lora)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return decoder, sum(p.numel() for p in layer_matrices(decoder) if p.requires_grad)
