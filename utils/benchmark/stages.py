"""Where the time of one run goes: named stages, timed on the real path.

clock = StageClock(torch.device("cpu"))
with clock.stage("encode"), clock.watching(memory_encoder.adapter, "project"):
    memory_encoder(spans)
clock.seconds            # {"encode": 0.31, "project": 0.01}: what is inside another stage is not counted in that one
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from utils.benchmark.measure import synchronize


class StageClock:
    """Adds up the seconds of stages.

    Args:
        device: Waited for at each border.
    """

    def __init__(self, device: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; a stage inside it stops this one's clock."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def watching(self, module: Any, name: str) -> Iterator[None]:
        """Inside this block, count each call of a torch module as a stage of its own."""
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._enter(name)),
            module.register_forward_hook(lambda *_: self._leave()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str) -> None:
        self._note()
        self._open.append(name)

    def _leave(self) -> None:
        self._note()
        self._open.pop()

    def _note(self) -> None:
        """Give the time since the last border to the innermost open stage."""
        synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class StagedJob:
    """A job for `time_interleaved` that keeps the stages of every run.

    Args:
        run: Called with a fresh clock.
        device: Waited for at each border.
    """

    def __init__(self, run: Callable[[StageClock], Any], device: Any) -> None:
        self._run = run
        self._device = device
        self.runs: list[dict[str, float]] = []

    def __call__(self) -> None:
        """Run once."""
        clock = StageClock(self._device)
        self._run(clock)
        self.runs.append(clock.seconds)
