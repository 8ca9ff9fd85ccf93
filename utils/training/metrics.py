"""A run's metrics: what its steps gave, one JSON line every few steps, and the loss curve as a picture."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from utils.errors import ConfigError
from utils.files import atomic_path, write_jsonl
from utils.training.config import StageConfig
from utils.training.rows import PackedRow

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
_SMOOTHING = 0.9
_READ_EVERY_S = 1.0
_MAX_SKIPPED_IN_A_ROW = 20


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there: accelerate itself leaves them out without a word.

    Raises:
        ConfigError: One is not installed, or unknown.
    """
    for name in names:
        if name not in get_available_trackers():
            known = ", ".join(str(tracker) for tracker in LoggerType if str(tracker) != "all")
            raise ConfigError(
                f"trackers: {name} is not installed, or no tracker of accelerate's ({known}): install it, or take it "
                "off the list"
            )


class StepResults:
    """What the steps of a stage gave, on the device until it is read: reading waits for all that is queued there.

    Args:
        names: Of the numbers that a step gives.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._skipped_in_a_row = 0
        self._waiting: list[torch.Tensor] = []
        self._last: dict[str, Any] = {}
        self._read_at = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Begin a new interval for the speeds: after a line, or after a time that was not spent on steps."""
        self._began, self._tokens, self._labels = time.monotonic(), 0, 0

    def add(self, result: torch.Tensor, rows: Sequence[PackedRow]) -> None:
        """Take a step's numbers, in the order of the names, and the rows that it was made on."""
        self._waiting.append(result)
        self._tokens += sum(len(row.input_ids) + row.memory_tokens for row in rows)
        self._labels += sum(row.num_labels for row in rows)
        self._last = {"examples": sum(len(row.lengths) for row in rows)}

    @property
    def are_due(self) -> bool:
        """Whether somebody who watches should see numbers again."""
        return time.monotonic() - self._read_at >= _READ_EVERY_S

    def read(self) -> list[dict[str, float]]:
        """The named numbers of each step since the last reading, in order.

        Raises:
            ConfigError: Step after step was not finite.
        """
        rows = torch.stack(self._waiting).tolist() if self._waiting else []
        read = [dict(zip(self._names, row, strict=True)) for row in rows]
        self._waiting, self._read_at = [], time.monotonic()
        self._last |= read[-1] if read else {}
        for step in read:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if step["skipped"] else 0
            if self._skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
                raise ConfigError(
                    f"{_MAX_SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient: lower the learning "
                    "rates of the stage, or train in float32"
                )
        return read

    @property
    def tokens_per_s(self) -> float:
        """Decoder rows and memory tokens a second, in the interval so far."""
        return self._tokens / max(time.monotonic() - self._began, 1e-9)

    def line(self) -> dict[str, Any]:
        """The newest step's numbers, its examples, and the speeds of the interval, which ends here."""
        labels_per_s = self.tokens_per_s * self._labels / max(1, self._tokens)
        speeds = {"tokens_per_s": round(self.tokens_per_s, 1), "labels_per_s": round(labels_per_s, 1)}
        self.restart()
        return {**self._last, **speeds}


class MetricsFile:
    """Lines of metrics in a run's output folder."""

    def __init__(self, output: Path, stages: Sequence[StageConfig]) -> None:
        self.path = output / METRICS_FILE
        self.curve_path = output / CURVE_FILE
        self.stages = stages

    def append(self, values: dict[str, Any]) -> None:
        """Write one line; it is on its way to the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def trim(self, global_step: int) -> None:
        """Drop lines of steps that a resumed run will do again, and what a kill left half written."""
        if self.path.exists():
            write_jsonl(self.path, (row for row in self._rows() if row["global_step"] <= global_step))

    def draw(self) -> None:
        """Draw the loss of all steps so far, one colour a stage."""
        rows = [row for row in self._rows() if math.isfinite(row["loss"])] if self.path.exists() else []
        if not rows:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        for stage in sorted({row["stage"] for row in rows}):
            points = [(row["global_step"], row["loss"]) for row in rows if row["stage"] == stage]
            steps, losses = zip(*points, strict=True)
            (line,) = axes.plot(steps, losses, alpha=0.25)
            sizes = "/".join(map(str, self.stages[stage].chunk_sizes))
            label = f"{stage} {self.stages[stage].preset}, chunk sizes {sizes}"
            axes.plot(steps, _smoothed(losses), color=line.get_color(), label=label)
        axes.set(xlabel="step", ylabel="loss per label token (align: part of the variance)", yscale="log")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        with atomic_path(self.curve_path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The whole lines; others are counted in a warning."""
        damaged = 0
        with self.path.open("rb") as stream:
            for line in stream:
                row = _parsed(line)
                if row is not None and row["stage"] < len(self.stages):
                    yield row
                else:
                    damaged += 1
        if damaged:
            logger.warning("%s: %d damaged lines are left out", self.path, damaged)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of metrics; None for anything else."""
    try:
        row = json.loads(line)
        good = all(type(row[name]) is int and row[name] >= 0 for name in ("stage", "global_step"))
        good = good and type(row["loss"]) in (int, float)
        math.isfinite(row["loss"])  # an error for a whole number that is larger than any float
    except (ValueError, RecursionError, TypeError, KeyError, OverflowError):
        return None
    return row if good else None


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append(mean / weight)
    return result
