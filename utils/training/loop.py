"""The training loop: stages, steps, checkpoints, metrics. Plain PyTorch; accelerate for devices and processes.

    trainer = Trainer(config, device="auto")
    outcome = trainer.run(deadline_s=600)          # "done", or "paused" with a checkpoint to go on from

A step's rows are drawn by every process in the same order and shared out among them, and every loss is divided by the
labels of the whole step: how many processes and rows a step is split into changes rounding only.

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

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from utils.checkpoint.default.trained_part import TrainedPart
from utils.errors import CheckpointError, ConfigError, DatasetError
from utils.files import provenance, write_json
from utils.model.processor import Processor
from utils.model.transfer import to_device
from utils.training.checkpoints import PROGRESS, Progress, check_fits, restore, save_checkpoint, whole_checkpoint
from utils.training.config import StageConfig, TrainConfig
from utils.training.data.cache import TokenCache
from utils.training.datasets import open_caches
from utils.training.losses import TrainedPair, check_alignable, loss_units
from utils.training.metrics import MetricsFile, StepResults, check_trackers
from utils.training.packing import ExampleStream, PackedRow, RowPacker, packed_ahead
from utils.training.pairs import starting_pair
from utils.training.parts import (
    add_lora,
    checkpoint_activations,
    parameter_groups,
    set_precision,
    start_from,
    trained_names,
)
from utils.training.run_folder import RUN_FILE, from_main, held_run
from utils.training.schedule import Schedule, rate_factor
from utils.training.sharding import full, shard, wants_sharding, without_sync
from utils.training.unpacking import unpacked_tokens

logger = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 20
_BETAS = (0.9, 0.95)


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
        check_trackers(config.trackers)
        self.accelerator = Accelerator(
            cpu=self.device == "cpu", log_with=list(config.trackers) or None, project_dir=config.output
        )
        _check_shares(config, self.accelerator.num_processes)
        model, self.tokenizers = starting_pair(config.pair, config.seed)
        # Which chunk sizes the weights know is settled when the pair is exported.
        model.code_chunker.config = dataclasses.replace(model.config, chunk_sizes=())
        if any(stage.preset == "align" for stage in config.stages):
            check_alignable(self.tokenizers)
        processor = Processor(tokenizers=self.tokenizers, chunk_size=model.config.chunk_size)
        # The main process builds what is missing; where folders are not shared, each machine waits for its own.
        made: list[dict[str, TokenCache]] = []
        from_main(lambda: made.append(open_caches(config, model, processor)))
        self.caches = made[0] if made else open_caches(config, model, processor, wait=True)
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
                checkpoint_activations(part)
        self.sharded = sharding and self.accelerator.num_processes > 1
        if self.sharded:
            shard(self.pair, self.accelerator.device)
        self.pair.to(self.accelerator.device).train()
        self.trained = trained_names(self.pair, config)
        self.metrics = MetricsFile(Path(config.output), config.stages)

    def run(self, deadline_s: float | None = None, last_stage: int | None = None) -> str:
        """Train from the newest checkpoint, or from the beginning.

        Args:
            deadline_s: Seconds that there are. The schedule of the last stage ends with them; a run that has not got
                so far by then saves and pauses.
            last_stage: The stage after which it pauses; by default it goes through all.

        Returns:
            "done" when all stages are, else "paused".

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
            except DatasetError as error:
                raise CheckpointError(f"{folder / PROGRESS} is damaged, or the data are others ({error})") from None

    def _run_stages(self, resumed: Path | None, deadline: float | None, last_stage: int | None) -> str:
        last = len(self.config.stages) - 1 if last_stage is None else last_stage
        while self.progress.stage < len(self.config.stages):
            out_of_time = deadline is not None and time.monotonic() >= deadline
            if self.progress.stage > last or self._agree(out_of_time):
                return "paused"
            stage = self.config.stages[self.progress.stage]
            if not self._run_stage(
                stage, resumed if self.progress.step else None, deadline, self.progress.stage == last
            ):
                return "paused"
            resumed = None
            number = self.progress.stage + 1
            self.progress = dataclasses.replace(self.progress, stage=number, step=0, place=0.0, packer=None)
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
        self, wrapped: Any, optimizer: torch.optim.Optimizer, stage: StageConfig, rows: list[PackedRow], place: float
    ) -> dict[str, float]:
        """`train_step`, waited for.

        Returns:
            The `step_numbers` by name.
        """
        numbers = self.train_step(wrapped, optimizer, stage, rows, place).tolist()
        return dict(zip(step_numbers(stage), numbers, strict=True))

    def train_step(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, stage: StageConfig, rows: list[PackedRow], place: float
    ) -> torch.Tensor:
        """One optimiser step; a gradient that is not finite leaves weights and optimiser as they are.

        Args:
            wrapped: From `prepare`, as the next.
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
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = rows[rank::world]
        device, count = self.accelerator.device, 2 if unpack else 1
        losses = torch.zeros(count, device=device)
        units, weights = to_device(
            np.array([[total, unpacked], [1.0, stage.unpack_weight]], dtype=np.float32)[:, :count].copy(), device
        )
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
        skipped = 1.0 - (torch.isfinite(norm) & torch.isfinite(losses).all()).float()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(place, stage)
        # What torch's GradScaler tells the fused kernel: where it is 1 nothing is changed, and nobody has to ask.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([*losses, norm.float(), skipped])

    def _autocast(self) -> Any:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _run_stage(self, stage: StageConfig, resumed: Path | None, deadline: float | None, is_last: bool) -> bool:
        """Run or go on with the current stage; False if it was interrupted (and saved)."""
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
                    self._save(optimizer)
                    return False
                began = time.monotonic()
                rows, self.progress.packer = next(steps)
                place = schedule.rate_place(self.progress.step)
                results.add(self.train_step(wrapped, optimizer, stage, rows, place), rows)
                schedule.place = self.progress.place = self._agreed(schedule)
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
                    self._save(optimizer)
                    saved = time.monotonic()
                    results.restart()
        return True

    def _read(self, results: StepResults, bar: Any) -> None:
        """Read what the steps since the last reading gave, which waits for the device."""
        steps = results.read()
        for number, step in enumerate(steps, start=self.progress.global_step - len(steps)):
            results.skipped_in_a_row = results.skipped_in_a_row + 1 if step["skipped"] else 0
            if step["skipped"]:
                self.progress.skipped += 1
                logger.warning("step %d left out: its loss or gradient is not finite", number)
            if results.skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
                raise ConfigError(
                    f"{_MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient: lower the learning "
                    "rates of the stage, or train in float32"
                )
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

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        main = self.accelerator.is_main_process
        if main or self.sharded:
            save_checkpoint(self.config, dataclasses.asdict(self.progress), self.trained, optimizer, write=main)
        if main:
            self.metrics.draw()
        self.accelerator.wait_for_everyone()

    def _agree(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return self._mean(float(wish)) > 0

    def _agreed(self, schedule: Schedule) -> float:
        """The schedule's next place, the same on every process: clocks differ."""
        place = schedule.next_place()
        return place if schedule.budget_s is None else self._mean(place)

    def _mean(self, value: float) -> float:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "mean"))


def step_numbers(stage: StageConfig) -> tuple[str, ...]:
    """What a step gives: `loss` a label (or memory token), with an unpack weight `unpack_loss`, a memory token that it
    covers; `grad_norm` before clipping; and `skipped`, 1 if the step was left out."""
    losses = ("loss", "unpack_loss") if stage.unpack_weight > 0 else ("loss",)
    return (*losses, "grad_norm", "skipped")


def _check_shares(config: TrainConfig, num_processes: int) -> None:
    for number, stage in enumerate(config.stages):
        if stage.rows % num_processes:
            raise ConfigError(
                f"stages[{number}].rows is {stage.rows}, which {num_processes} processes cannot share evenly: choose a "
                f"multiple of {num_processes}"
            )
