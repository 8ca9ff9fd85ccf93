"""A sitting of a run as its command asks for it: train until done, out of time or told to stop, then export."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from utils.training.config import TrainConfig
from utils.training.estimate import describe, estimate_run
from utils.training.export import export_pair
from utils.training.loop import StopRequest, Trainer
from utils.training.run_folder import held_run


def run(config: TrainConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    """Train, and export the pair when all is done; or, for a dry run, estimate what that would cost.

    Returns:
        The outcome as JSON values and as text, both empty on all processes but the main one; whether Ctrl-C ended it.
    """
    if args.dry_run:
        estimate = estimate_run(config, device=args.device)
        return estimate, describe(estimate), False
    stop = StopRequest()
    # Another run in the folder is better known before data are made and weights are read.
    with held_run(config.output, cpu=args.device == "cpu"):
        with _stop_on_signals(stop):
            trainer = Trainer(config, device=args.device, stop=stop)
            outcome = trainer.run(None if args.max_minutes is None else 60 * args.max_minutes, args.stage)
        result: dict[str, Any] = {
            "outcome": outcome,
            "output": config.output,
            "steps": trainer.progress.global_step,
            "total_steps": config.total_steps,
            "skipped": trainer.progress.skipped,
        }
        if outcome == "done" and not args.no_export and trainer.accelerator.is_main_process:
            result["model"] = str(export_pair(config))
    if not trainer.accelerator.is_main_process:
        return {}, "", stop.by_keyboard
    # A run that went by the clock is done before its steps are.
    by_clock = outcome == "done" and result["steps"] != result["total_steps"]
    steps = f"{result['steps']} steps" if by_clock else f"{result['steps']} of {result['total_steps']} steps"
    model = f"; model in {result['model']}" if "model" in result else ""
    return result, f"{outcome}: {steps} in {config.output}{model}", stop.by_keyboard


@contextlib.contextmanager
def _stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C end the run after the step under way, with a checkpoint."""

    def handle(number: int, frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True
        stop.by_keyboard = number == signal.SIGINT

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
