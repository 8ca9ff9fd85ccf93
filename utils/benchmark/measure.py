"""Timing in turns, fresh processes and their memory, tables, and the machine's description. Knows no model of ours.

timings = time_interleaved({"ours": f, "reference": g}, repeats=7)     # A B A B …
timings["ours"].median_s, timings["ours"].spread
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils.checkpoint.load import has_native_bfloat16
from utils.errors import ConfigError
from utils.files import provenance

T = TypeVar("T")
MIB = 2**20


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


def time_interleaved(
    jobs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time jobs in turn, A B C A B C …, so that a drift of the machine's speed meets all of them.

    Args:
        jobs: Name → what to run.
        repeats: Counted rounds, after one to warm up.
        device: Waited for at the end of each job.

    Raises:
        ConfigError: No rounds.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: expected at least 1")
    runs: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            synchronize(device)
            if number:
                runs[name].append(time.perf_counter() - began)
    return {name: Timing(runs_s=tuple(values)) for name, values in runs.items()}


def synchronize(device: torch.device | None) -> None:
    """Wait for a device; the CPU has nothing outstanding."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator / denominator: each pair met the same machine."""
    pairs = zip(numerator.runs_s, denominator.runs_s, strict=True)
    return statistics.median(a / b for a, b in pairs)


def runs_of(timings: Mapping[str, Timing]) -> dict[str, tuple[float, ...]]:
    """Every run, for the result."""
    return {name: timing.runs_s for name, timing in timings.items()}


def in_a_fresh_process(job: Callable[..., T], *arguments: Any) -> T:
    """Run a module's function in a process that has imported and allocated nothing before.

    Raises:
        ConfigError: The process was ended, most likely for lack of memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(job, *arguments).result()
        except BrokenProcessPool:
            raise ConfigError(
                "the measured process was ended, most likely for lack of memory: lower the sizes"
            ) from None


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: of the device where that is a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most bytes that it has held since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def forget_peak() -> None:
    """Let the peak begin here; where the kernel does not allow that, what came before counts too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_bytes(name: str) -> int:
    """A figure of this process; unlike getrusage's, it knows nothing of the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError("memory is read from /proc/self/status: run this benchmark on Linux") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine() -> dict[str, Any]:
    """Processor and what it is fast in, device, threads, load and versions of this run."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": has_native_bfloat16(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_1min": round(os.getloadavg()[0], 2),
        **provenance(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
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
