"""Work in a fresh process, and the memory that it took."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import ConfigError

T = TypeVar("T")


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


def held_bytes(device: Any) -> int:
    """Bytes that this process holds now: of the device where that is a GPU."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_bytes(device: Any) -> int:
    """The most bytes that it has held since `forget_peak`."""
    import torch

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
