"""Ends a training run after so many steps, as a signal would."""

from __future__ import annotations

from utils.training.loop import StopRequest


class StopAfter(StopRequest):
    """Asked for the n-th time, it says stop."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.by_keyboard = False

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.times -= 1
        return self.times < 0
