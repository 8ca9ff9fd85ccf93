"""The training loop: stages, steps, checkpoints, metrics. Plain PyTorch; accelerate for devices and processes.

    trainer = Trainer(config, device="auto")
    outcome = trainer.run(deadline_s=600)          # "done", or "paused" with a checkpoint to go on from

Nothing in a step waits for the device, or a GPU would stand idle while its next step is packed and launched: rows are
packed ahead, a step that is not finite is left out by the optimiser itself, and results are read now and then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.checkpoint.default.trained_part import TrainedPart
from utils.errors import CheckpointError, ConfigError, DatasetError
from utils.files import provenance, write_json
from utils.model.processor import Processor
from utils.training.checkpoints import PROGRESS, Progress, check_fits, restore, save_checkpoint, whole_checkpoint
from utils.training.config import StageConfig, TrainConfig
from utils.training.data.cache import TokenCache
from utils.training.data.folder import open_caches
from utils.training.losses import TrainedPair, check_alignable
from utils.training.metrics import MetricsFile, StepResults, check_trackers
from utils.training.packing import ExampleStream, RowPacker, packed_ahead
from utils.training.pairs import starting_pair
from utils.training.parts import (
    add_lora,
    checkpoint_activations,
    parameter_groups,
    set_precision,
    start_from,
    trained_names,
)
from utils.training.rows import PackedRow
from utils.training.run_folder import RUN_FILE, from_main, held_run
from utils.training.schedule import Schedule, rate_factor
from utils.training.sharding import check_shares, shard, wants_sharding
from utils.training.step import step_numbers, train_step
from utils.training.teaching import check_teachers

logger = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Set by a signal handler, perhaps Ctrl-C's; the loop saves and ends after the step under way."""

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
        check_trackers(config.trackers)
        self.accelerator = Accelerator(
            cpu=self.device == "cpu", log_with=list(config.trackers) or None, project_dir=config.output
        )
        check_shares(config, self.accelerator.num_processes)
        model, self.tokenizers = starting_pair(config.pair, config.seed)
        if any(stage.ratios > 1 for stage in config.stages):
            model.memory_encoder.check_several_sizes()
        # Which chunk sizes the weights know is settled when the pair is exported.
        model.code_chunker.config = dataclasses.replace(model.config, chunk_sizes=())
        if any(stage.preset == "align" for stage in config.stages):
            check_alignable(self.tokenizers)
        processor = Processor(tokenizers=self.tokenizers, chunk_size=model.config.chunk_size)
        # The main process builds what is missing; where folders are not shared, each machine waits for its own.
        made: list[dict[str, TokenCache]] = []
        from_main(lambda: made.append(open_caches(config, model, processor)))
        self.caches = made[0] if made else open_caches(config, model, processor, wait=True)
        check_teachers(config, self.caches)
        unpack = any(stage.unpack_weight for stage in config.stages)
        self.pair = TrainedPair(model, self.tokenizers.markers, unpack=unpack)
        torch.manual_seed(config.seed)
        add_lora(self.pair, config)
        set_precision(self.pair, config)
        self.progress = Progress(stage=0, step=0, global_step=0, skipped=0, labels=0, seconds=0.0, packer=None)
        if config.pair.trained:
            packed = TrainedPart.open(config.pair.trained)
            start_from(packed, trained_names(self.pair, config), config)
            self.progress.started_from = packed.history
        if config.gradient_checkpointing:
            checkpoint_activations(self.pair)
        self.sharded = sharding and self.accelerator.num_processes > 1
        if self.sharded:
            shard(self.pair, self.accelerator.device)
        self.pair.to(self.accelerator.device).train()
        self.trained = trained_names(self.pair, config)
        self.metrics = MetricsFile(Path(config.output), config.stages)

    def run(self, deadline_s: float | None = None, last_stage: int | None = None) -> str:
        """Train from the newest checkpoint, or from the beginning; "done" when all stages are, else "paused".

        Args:
            deadline_s: Seconds that there are. The schedule of the last stage ends with them; a run that has not got
                so far by then saves and pauses.
            last_stage: The stage after which it pauses; by default it goes through all.

        Raises:
            ConfigError: The newest checkpoint belongs to other settings, or training diverges.
            CheckpointError: A checkpoint cannot be written or read.
        """
        began = time.monotonic()
        with held_run(self.config.output):
            resumed = self._resume()
            if self.accelerator.is_main_process:
                write_json(Path(self.config.output) / RUN_FILE, {**self.config.what_is_trained(), **provenance()})
                self.metrics.trim(self.progress.global_step)
            self.accelerator.init_trackers(self.config.name)
            try:
                return self._run_stages(resumed, None if deadline_s is None else began + deadline_s, last_stage)
            finally:
                for tracker in self.accelerator.trackers:
                    tracker.finish()

    def _resume(self) -> Path | None:
        """Go to where the newest whole checkpoint stands; None if there is none."""
        found = from_main(lambda: whole_checkpoint(self.config, self._check))
        if found is None:
            return None
        folder, self.progress = found
        restore(folder, self.trained)
        logger.info("going on from %s", folder)
        return folder

    def _check(self, folder: Path, progress: Progress) -> None:
        """Refuse a checkpoint that does not fit this run's parameters and data."""
        check_fits(folder, self.trained, within_stage=progress.step > 0)
        if progress.packer is not None and progress.stage < len(self.config.stages):
            try:
                self.packer(progress.stage).restore(progress.packer)
            except (ConfigError, DatasetError) as error:
                raise CheckpointError(f"{folder / PROGRESS} is damaged, or the data are others ({error})") from None

    def _run_stages(self, resumed: Path | None, deadline: float | None, last_stage: int | None) -> str:
        last = len(self.config.stages) - 1 if last_stage is None else last_stage
        while (number := self.progress.stage) < len(self.config.stages):
            out_of_time = deadline is not None and time.monotonic() >= deadline
            if number > last or self._agree(out_of_time):
                return "paused"
            if not self._run_stage(resumed if self.progress.step else None, deadline, number == last):
                return "paused"
            resumed = None
            self.progress = dataclasses.replace(self.progress, stage=number + 1, step=0, place=0.0, packer=None)
            self.save(None)
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
            expanded=stage.expanded,
            ratios=stage.ratios,
        )
        return RowPacker(
            stream,
            stage.row_tokens,
            self.tokenizers.markers,
            stage.memory_tokens,
            stage.length_discount,
            teacher_tokens=self.pair.decoder.config.max_position_embeddings if stage.teacher_weight else None,
        )

    def prepare(self, stage: StageConfig) -> tuple[Any, torch.optim.Optimizer]:
        """The pair and an optimiser for a stage, wrapped for the processes there are."""
        groups = parameter_groups(self.pair, self.config, stage)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        if self.sharded:
            return self.pair, optimizer
        return self.accelerator.prepare_model(self.pair, evaluation_mode=False), optimizer

    def optimize(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, stage: StageConfig, rows: list[PackedRow], place: float
    ) -> dict[str, float]:
        """A `train_step`, waited for: its `step_numbers` by name."""
        numbers = train_step(self.accelerator, self.config.precision, wrapped, optimizer, stage, rows, place)
        return dict(zip(step_numbers(stage), numbers.tolist(), strict=True))

    def _run_stage(self, resumed: Path | None, deadline: float | None, is_last: bool) -> bool:
        """Run or go on with the current stage; False if it was interrupted (and saved)."""
        stage = self.config.stages[self.progress.stage]
        packer = self.packer(self.progress.stage)
        wrapped, optimizer = self.prepare(stage)
        if resumed is not None:
            restore(resumed, self.trained, optimizer)
        if self.progress.packer is not None:
            packer.restore(self.progress.packer)
        saved = time.monotonic()
        budget_s = deadline - saved if deadline is not None and is_last else None
        schedule = Schedule(stage, max(self.progress.place, self.progress.step), budget_s)
        results = StepResults(step_numbers(stage))
        bar = tqdm(
            total=stage.steps,
            initial=int(schedule.place),
            desc=f"stage {self.progress.stage} ({stage.preset})",
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
        steps = packed_ahead(packer, lambda: self.step_rows(packer, stage))
        with bar, contextlib.closing(steps):
            while not schedule.is_over:
                out_of_time = deadline is not None and not is_last and time.monotonic() > deadline
                if self._agree(out_of_time or self.stop.requested):
                    self._read(results, bar)
                    self.save(optimizer)
                    return False
                began = time.monotonic()
                rows, self.progress.packer = next(steps)
                place = schedule.rate_place(self.progress.step)
                numbers = train_step(self.accelerator, self.config.precision, wrapped, optimizer, stage, rows, place)
                results.add(numbers, rows)
                # By the clock the place must be the same on every process all the same.
                schedule.place = schedule.next_place()
                if budget_s is not None:
                    schedule.place = self._mean(schedule.place)
                self.progress.place = schedule.place
                self.progress.step += 1
                self.progress.global_step += 1
                self.progress.labels += sum(row.num_labels for row in rows)
                bar.update(int(schedule.place) - bar.n)
                is_line = schedule.is_over or self.progress.step % self.config.log_every == 0
                # All processes or none: they wait for one another while one writes.
                is_save = self._agree(time.monotonic() - saved >= 60 * self.config.save_minutes)
                if is_line or is_save or results.are_due:
                    self._read(results, bar)
                self.progress.seconds += time.monotonic() - began
                if is_line:
                    self._write_line(results, rate_factor(place, stage))
                if is_save:
                    self.save(optimizer)
                    saved = time.monotonic()
                    results.restart()
        return True

    def _read(self, results: StepResults, bar: Any) -> None:
        """Read what the steps since the last reading gave, which waits for the device."""
        steps = results.read()
        for number, step in enumerate(steps, start=self.progress.global_step - len(steps)):
            if step["skipped"]:
                self.progress.skipped += 1
                logger.warning("step %d left out: its loss or gradient is not finite", number)
        if steps:
            bar.set_postfix_str(f"loss {steps[-1]['loss']:.3f}, {results.tokens_per_s:.0f} tokens/s")

    def _write_line(self, results: StepResults, factor: float) -> None:
        values = {
            "stage": self.progress.stage,
            "step": self.progress.step,
            "global_step": self.progress.global_step,
            **results.line(),
            "rate_factor": factor,
            "too_long": self.progress.packer["too_long"] if self.progress.packer else 0,
            "skipped_in_all": self.progress.skipped,
            "labels_in_all": self.progress.labels,
            "seconds_in_all": round(self.progress.seconds, 1),
        }
        if self.accelerator.is_main_process:
            self.metrics.append(values)
            self.accelerator.log(values, step=self.progress.global_step)

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write a checkpoint and draw the curve; within a stage with its optimiser's state."""
        main = self.accelerator.is_main_process
        if main or self.sharded:
            save_checkpoint(self.config, self.progress, self.trained, optimizer, write=main)
        if main:
            self.metrics.draw()
        self.accelerator.wait_for_everyone()

    def _agree(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return self._mean(float(wish)) > 0

    def _mean(self, value: float) -> float:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "mean"))
