"""How far a stage has come, and what its learning rates are there.

    schedule = Schedule(stage, budget_s=420)
    factor = rate_factor(schedule.rate_place(step=0), stage)     # of the peak learning rates
    schedule.place = schedule.next_place()                       # after each step

A place is counted in steps. Without a time budget each step is one place further. With one, the schedule ends when the
time does: the cosine comes down to its floor whether the machine made ten thousand steps or one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from utils.training.config import StageConfig


@dataclass
class Schedule:
    """Where a stage stands between its beginning and its end.

    Attributes:
        stage: Its settings; its `steps` are the most that it takes.
        place: From 0 to `stage.steps`.
        budget_s: Seconds from now in which it shall end, or None.
    """

    stage: StageConfig
    place: float = 0.0
    budget_s: float | None = None
    _first: float = field(init=False)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._first, self._began = self.place, time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the stage is done."""
        return self.place >= self.stage.steps

    def rate_place(self, step: int) -> float:
        """What the learning rates of a step go by: in the warm-up its number, however little time there is."""
        return step if step < self.stage.warmup_steps else self.place

    def next_place(self) -> float:
        """Where the stage stands after one more step, by steps and, with a budget, by the time that has gone."""
        place = self.place + 1
        if self.budget_s is not None:
            gone = (time.monotonic() - self._began) / self.budget_s
            place = max(place, self._first + gone * (self.stage.steps - self._first))
        return min(place, self.stage.steps)


def rate_factor(place: float, stage: StageConfig) -> float:
    """What the peak learning rate is multiplied with at a place: a linear rise, then a cosine to `final_rate`."""
    if place < stage.warmup_steps:
        return (place + 1) / stage.warmup_steps
    share = (place - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
