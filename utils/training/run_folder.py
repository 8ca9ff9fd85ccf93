"""One run a folder: its lock, what a killed run left in it, and what the main process decides for all.

with held_run(config.output):                # every process of the run calls it; an error where another run is
    newest = from_main(lambda: whole_checkpoint(config))
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from utils.errors import CodeLlavaError
from utils.locks import remove_leftovers, sole_writer
from utils.training.checkpoints import FOLDER, STEPS
from utils.training.metrics import CURVE_FILE, METRICS_FILE

RUN_FILE = "run.json"
MODEL_FOLDER = "model"

T = TypeVar("T")


@contextlib.contextmanager
def held_run(output: str | Path, *, cpu: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder, and remove what one that was killed left there; may be nested.

    Args:
        output: Folder of the run.
        cpu: Train on the CPU; only of a meaning where this is what first joins the run's processes.

    Raises:
        ConfigError: Another run is at work in the folder: on all processes, nothing having been changed.
    """
    PartialState(cpu=cpu)
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            if stack.enter_context(sole_writer(output)):
                remove_leftovers(Path(output) / FOLDER, STEPS)
                remove_leftovers(Path(output), RUN_FILE, METRICS_FILE, CURVE_FILE, MODEL_FOLDER)

        from_main(hold)
        yield


def from_main(work: Callable[[], T]) -> T:
    """What the main process gets from a call that only it makes; all others wait for it.

    Raises:
        CodeLlavaError: The call's error, on every process.
        OSError: As well.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except (CodeLlavaError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
