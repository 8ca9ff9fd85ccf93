"""A run's metrics: one JSON line every few steps, and the loss curve as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic_path, read_jsonl, write_jsonl
from utils.training.config import StageConfig

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
_SMOOTHING = 0.9


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
        """Drop lines of steps that a resumed run will do again."""
        if self.path.is_file():
            kept = [row for row in read_jsonl(self.path) if row["global_step"] <= global_step]
            write_jsonl(self.path, kept)

    def draw(self) -> None:
        """Draw the loss of all steps so far, one colour a stage."""
        rows = list(read_jsonl(self.path)) if self.path.is_file() else []
        rows = [row for row in rows if row["loss"] == row["loss"]]
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


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append(mean / weight)
    return result
