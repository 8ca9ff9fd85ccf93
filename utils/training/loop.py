"""The training loop: stages, steps, checkpoints, metrics. Plain PyTorch; accelerate for devices and processes.

    trainer = Trainer(config, device="auto")
    outcome = trainer.run(deadline_s=600)          # "done", or "paused" with a checkpoint to go on from

A step's rows are drawn by every process in the same order and shared out among them, and every loss is divided by the
labels of the whole step: how many processes and rows a step is split into changes rounding only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from utils.errors import ConfigError
from utils.files import provenance, write_json
from utils.inference.trained_part import TrainedPart
from utils.model.processor import Processor
from utils.training.checkpoints import newest_checkpoint, read_progress, restore, save_checkpoint
from utils.training.config import StageConfig, TrainConfig
from utils.training.datasets import open_caches
from utils.training.metrics import MetricsFile
from utils.training.objective import TrainedPair, check_alignable, loss_units
from utils.training.packing import ExampleStream, PackedRow, RowPacker
from utils.training.pairs import load_pair
from utils.training.parts import add_lora, parameter_groups, set_precision, start_from, trained_names
from utils.training.sharding import full, shard, wants_sharding, without_sync
from utils.training.unpacking import unpacked_tokens

logger = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 20
_BETAS = (0.9, 0.95)


@dataclass
class Progress:
    """Where a run stands; stored in checkpoints as JSON.

    Attributes:
        stage: Index of the stage.
        step: Steps done in it.
        global_step: Steps done in all.
        skipped: Steps left out because loss or gradient was not finite.
        labels: Tokens that a loss was taken on.
        seconds: Time spent in steps.
        packer: Data cursor of the stage; None at its beginning.
        started_from: The trained part that the run began with: its fingerprint, run and configuration.
    """

    stage: int = 0
    step: int = 0
    global_step: int = 0
    skipped: int = 0
    labels: int = 0
    seconds: float = 0.0
    packer: dict[str, Any] | None = None
    started_from: dict[str, Any] | None = None


@dataclass
class StopRequest:
    """Set by a signal handler; the loop saves and ends after the step under way.

    Attributes:
        requested: Whether to end.
        by_keyboard: Whether it was Ctrl-C.
    """

    requested: bool = False
    by_keyboard: bool = False


@dataclass
class Trainer:
    """One run of a configuration.

    Attributes:
        config: What to do.
        device: "auto" or "cpu"; several processes are accelerate's matter.
        stop: Ends the run early when set.
    """

    config: TrainConfig
    device: str = "auto"
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        sharding = wants_sharding()
        _check_trackers(config.trackers)
        self.accelerator = Accelerator(
            cpu=self.device == "cpu", log_with=list(config.trackers) or None, project_dir=config.output
        )
        _check_shares(config, self.accelerator.num_processes)
        model, self.tokenizers = load_pair(config.pair, config.seed)
        # Which chunk sizes the weights know is settled when the pair is exported.
        model.code_chunker.config = dataclasses.replace(model.config, chunk_sizes=())
        if any(stage.preset == "align" for stage in config.stages):
            check_alignable(self.tokenizers)
        processor = Processor(tokenizers=self.tokenizers, chunk_size=model.config.chunk_size)
        with self.accelerator.main_process_first():
            self.caches = open_caches(config, model, processor)
        unpack = any(stage.unpack_weight for stage in config.stages)
        self.pair = TrainedPair(model, self.tokenizers.markers, unpack=unpack)
        torch.manual_seed(config.seed)
        add_lora(self.pair, config)
        set_precision(self.pair, config)
        self.progress = Progress()
        if config.pair.trained:
            packed = TrainedPart.open(config.pair.trained)
            start_from(packed, trained_names(self.pair, config), config)
            self.progress.started_from = packed.history
        if config.gradient_checkpointing:
            for part in (self.pair.decoder, self.pair.memory_encoder.chunker.encoder):
                _checkpoint_activations(part)
        self.sharded = sharding and self.accelerator.num_processes > 1
        if self.sharded:
            shard(self.pair, self.accelerator.device)
        self.pair.to(self.accelerator.device).train()
        self.trained = trained_names(self.pair, config)
        self.metrics = MetricsFile(Path(config.output), config.stages)

    def run(self, deadline_s: float | None = None, last_stage: int | None = None) -> str:
        """Train from the newest checkpoint, or from the beginning.

        Args:
            deadline_s: Seconds after which the run saves and pauses.
            last_stage: The stage after which it pauses; by default it goes through all.

        Returns:
            "done" when all stages are, else "paused".

        Raises:
            ConfigError: The newest checkpoint belongs to other settings, or training diverges.
            CheckpointError: A checkpoint cannot be written or read.
        """
        began = time.monotonic()
        resumed = newest_checkpoint(self.config.output)
        if resumed is not None:
            self.progress = Progress(**read_progress(resumed, self.config))
            restore(resumed, self.trained)
            logger.info("going on from %s", resumed)
        if self.accelerator.is_main_process:
            write_json(Path(self.config.output) / "run.json", {**self.config.what_is_trained(), **provenance()})
            self.metrics.trim(self.progress.global_step)
        self.accelerator.init_trackers(self.config.name)
        try:
            return self._run_stages(resumed, None if deadline_s is None else began + deadline_s, last_stage)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _run_stages(self, resumed: Path | None, deadline: float | None, last_stage: int | None) -> str:
        while self.progress.stage < len(self.config.stages):
            if last_stage is not None and self.progress.stage > last_stage:
                return "paused"
            stage = self.config.stages[self.progress.stage]
            left = None if deadline is None else deadline - time.monotonic()
            if not self._run_stage(stage, resumed if self.progress.step else None, left):
                return "paused"
            resumed = None
            self.progress = dataclasses.replace(self.progress, stage=self.progress.stage + 1, step=0, packer=None)
            self._save(None)
        return "done"

    def step_rows(self, packer: RowPacker, stage: StageConfig) -> list[PackedRow]:
        """The rows of one step, the same on every process."""
        return [packer.next_row() for _ in range(stage.rows)]

    def packer(self, stage_number: int) -> RowPacker:
        """The source of a stage's rows, from its beginning."""
        stage = self.config.stages[stage_number]
        stream = ExampleStream(
            self.caches,
            stage.mixture or dict.fromkeys(self.caches, 1.0),
            stage.chunk_sizes,
            seed=f"{self.config.seed} stage {stage_number}",
        )
        return RowPacker(stream, stage.row_tokens, self.tokenizers.markers, stage.memory_tokens, stage.length_discount)

    def prepare(self, stage: StageConfig) -> tuple[Any, torch.optim.Optimizer]:
        """The pair and an optimiser for a stage, wrapped for the processes there are."""
        groups = parameter_groups(self.pair, self.config, stage)
        optimizer = torch.optim.AdamW(groups, betas=_BETAS, fused=True)
        if self.sharded:
            return self.pair, optimizer
        return self.accelerator.prepare_model(self.pair, evaluation_mode=False), optimizer

    def optimize(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, stage: StageConfig, rows: list[PackedRow], step: int
    ) -> dict[str, float]:
        """One optimiser step; a gradient that is not finite leaves the weights as they are.

        Returns:
            `loss` a label (or memory token), `grad_norm`, and `skipped`, 1 if the step was left out; with an unpack
            weight `unpack_loss`, a memory token that it covers.
        """
        align, unpack = stage.preset == "align", stage.unpack_weight > 0
        total = sum(loss_units(row, align) for row in rows)
        unpacked = max(1, sum(unpacked_tokens(row.spans) for row in rows))
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = rows[rank::world]
        losses = torch.zeros(2 if unpack else 1, device=self.accelerator.device)
        units = torch.tensor([total, unpacked][: len(losses)], device=losses.device)
        weights = torch.tensor([1.0, stage.unpack_weight][: len(losses)], device=losses.device)
        for number, row in enumerate(mine):
            last = number == len(mine) - 1
            with contextlib.nullcontext() if last else without_sync(self.accelerator, wrapped):
                with self._autocast():
                    parts = wrapped(row, align, unpack).reshape(-1) / units
                # Distributed wrappers average gradients where a sum is wanted.
                self.accelerator.backward((parts * weights).sum() * world)
            losses += parts.detach()
        losses = self.accelerator.reduce(losses, "sum")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = full(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        clip_grads_with_norm_(parameters, stage.clip_norm, norm)
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(losses).all())
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(step, stage)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        named = dict(zip(("loss", "unpack_loss"), losses.tolist(), strict=False))
        return {**named, "grad_norm": float(norm), "skipped": float(not finite)}

    def _autocast(self) -> Any:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _run_stage(self, stage: StageConfig, resumed: Path | None, left_s: float | None) -> bool:
        """Run or go on with the current stage; False if it was interrupted (and saved)."""
        began = saved = time.monotonic()
        packer = self.packer(self.progress.stage)
        wrapped, optimizer = self.prepare(stage)
        if resumed is not None:
            restore(resumed, self.trained, optimizer)
        if self.progress.packer is not None:
            packer.restore(self.progress.packer)
        skipped_in_a_row = 0
        bar = tqdm(
            total=stage.steps,
            initial=self.progress.step,
            desc=f"stage {self.progress.stage} ({stage.preset})",
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar:
            while self.progress.step < stage.steps:
                out_of_time = left_s is not None and time.monotonic() - began > left_s
                if self._agree(out_of_time or self.stop.requested):
                    self._save(optimizer)
                    return False
                step_began = time.monotonic()
                rows = self.step_rows(packer, stage)
                result = self.optimize(wrapped, optimizer, stage, rows, self.progress.step)
                seconds = time.monotonic() - step_began
                skipped_in_a_row = self._check_finite(result, skipped_in_a_row)
                self._count(rows, seconds, packer)
                self._report(bar, stage, rows, result, seconds, packer)
                if time.monotonic() - saved >= 60 * self.config.save_minutes:
                    self._save(optimizer)
                    saved = time.monotonic()
        return True

    def _check_finite(self, result: dict[str, float], skipped_in_a_row: int) -> int:
        if not result["skipped"]:
            return 0
        self.progress.skipped += 1
        logger.warning("step %d left out: its loss or gradient is not finite", self.progress.global_step)
        if skipped_in_a_row + 1 == _MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(
                f"{_MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient: lower the learning "
                "rates of the stage, or train in float32"
            )
        return skipped_in_a_row + 1

    def _count(self, rows: list[PackedRow], seconds: float, packer: RowPacker) -> None:
        self.progress.step += 1
        self.progress.global_step += 1
        self.progress.labels += sum(row.num_labels for row in rows)
        self.progress.seconds += seconds
        self.progress.packer = packer.state()

    def _report(
        self,
        bar: Any,
        stage: StageConfig,
        rows: list[PackedRow],
        result: dict[str, float],
        seconds: float,
        packer: RowPacker,
    ) -> None:
        tokens = sum(len(row.input_ids) + row.memory_tokens for row in rows)
        bar.update(1)
        bar.set_postfix_str(f"loss {result['loss']:.3f}, {tokens / seconds:.0f} tokens/s")
        last = self.progress.step == stage.steps
        if self.accelerator.is_main_process and (last or self.progress.step % self.config.log_every == 0):
            values = {
                "stage": self.progress.stage,
                "step": self.progress.step,
                "global_step": self.progress.global_step,
                **result,
                "rate_factor": rate_factor(self.progress.step - 1, stage),
                "tokens_per_s": round(tokens / seconds, 1),
                "labels_per_s": round(sum(row.num_labels for row in rows) / seconds, 1),
                "examples": sum(len(row.lengths) for row in rows),
                "too_long": packer.too_long,
                "skipped_in_all": self.progress.skipped,
                "labels_in_all": self.progress.labels,
                "seconds_in_all": round(self.progress.seconds, 1),
            }
            self.metrics.append(values)
            self.accelerator.log(values, step=self.progress.global_step)

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        main = self.accelerator.is_main_process
        if main or self.sharded:
            save_checkpoint(self.config, dataclasses.asdict(self.progress), self.trained, optimizer, write=main)
        if main:
            self.metrics.draw()
        self.accelerator.wait_for_everyone()

    def _agree(self, wish: bool) -> bool:
        """Whether any process wishes to stop."""
        if self.accelerator.num_processes == 1:
            return wish
        flag = torch.tensor(float(wish), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


def _checkpoint_activations(model: Any) -> None:
    """Keep inputs of layers only; the method's name changed within transformers 5."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def rate_factor(step: int, stage: StageConfig) -> float:
    """What the peak learning rate is multiplied with at a step: a linear rise, then a cosine to `final_rate`."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    share = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _check_trackers(names: Sequence[str]) -> None:
    """accelerate itself leaves out what is not installed, without a word."""
    for name in names:
        if name not in get_available_trackers():
            known = ", ".join(str(tracker) for tracker in LoggerType if str(tracker) != "all")
            raise ConfigError(
                f"trackers: {name} is not installed, or no tracker of accelerate's ({known}): install it, or take it "
                "off the list"
            )


def _check_shares(config: TrainConfig, num_processes: int) -> None:
    for number, stage in enumerate(config.stages):
        if stage.rows % num_processes:
            raise ConfigError(
                f"stages[{number}].rows is {stage.rows}, which {num_processes} processes cannot share evenly: choose a "
                f"multiple of {num_processes}"
            )
