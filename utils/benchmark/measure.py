"""Interleaved timing and the header every benchmark result carries. Knows no model.

timings = time_interleaved({"ours": f, "reference": g}, repeats=7)     # A B A B …
timings["ours"].median_s, timings["ours"].spread
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.files import provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall-clock seconds of one job's runs, in the order of the rounds."""

    runs_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The figure to quote."""
        return statistics.median(self.runs_s)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median: how noisy the machine was."""
        return (max(self.runs_s) - min(self.runs_s)) / self.median_s


def time_interleaved(jobs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time jobs in turn, A B C A B C …, so that a drift of the machine's speed meets all of them.

    Args:
        jobs: Name → what to run; it must wait for its own device work.
        repeats: Counted rounds.
        warmup: Rounds before them.
    """
    for _ in range(warmup):
        for job in jobs.values():
            job()
    runs: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            runs[name].append(time.perf_counter() - began)
    return {name: Timing(runs_s=tuple(values)) for name, values in runs.items()}


def finished(job: Callable[[], Any], device: Any) -> Callable[[], Any]:
    """The job together with the device work that it started."""
    if device.type != "cuda":
        return job

    def waited() -> None:
        job()
        synchronize(device)

    return waited


def synchronize(device: Any) -> None:
    """Wait for a torch device; the CPU has nothing outstanding."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def median_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator / denominator: each pair met the same machine."""
    pairs = zip(numerator.runs_s, denominator.runs_s, strict=True)
    return statistics.median(a / b for a, b in pairs)


def machine() -> dict[str, Any]:
    """Processor, device, threads and versions of this run."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_1min": round(os.getloadavg()[0], 2),
        **provenance(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table that reads well as text and as markdown."""
    cells = [tuple(str(value) for value in row) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
