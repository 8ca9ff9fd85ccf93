"""`python -m utils.training.train`: run, resume, inspect and export a training run."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_INTERRUPTED, EXIT_OK, make_parser, print_json, run_command
from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.training.config import TrainConfig
    from utils.training.loop import StopRequest


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.train`."""
    parser = make_parser(
        "Train a pair in stages; the same command goes on where an earlier one stopped.",
        examples="""\
  uv run python -m utils.training.train --config utils/training/configs/toy.yaml
  uv run python -m utils.training.train --config utils/training/configs/cpu_default.yaml --dry-run
  timeout 30m uv run python -m utils.training.train --config utils/training/configs/cpu_default.yaml
  uv run python -m utils.training.train --config utils/training/configs/gpu_default.yaml --max-minutes 10
  uv run accelerate launch --num-processes 8 -m utils.training.train --config utils/training/configs/qwen3_pair.yaml""",
        prog="python -m utils.training.train",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--output", help="folder of the run; default: the one in the configuration")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="default auto: a GPU if there is one")
    parser.add_argument("--stage", type=int, metavar="N", help="stop after stage N (from 0); default: after the last")
    parser.add_argument(
        "--max-minutes",
        type=float,
        help="all the time there is: the learning rates come down with it, and the run is done when it is over (or "
        "paused, if the last stage has not begun); default: no limit, the stages' steps count",
    )
    parser.add_argument("--no-export", action="store_true", help="do not write the trained pair at the end")
    parser.add_argument("--dry-run", action="store_true", help="print counts, FLOPs, memory and time; train nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    config = _read_config(args)
    if args.dry_run:
        from utils.training.estimate import describe, estimate_run

        result = estimate_run(config, device=args.device)
        _print(result if args.json else describe(result), args.json)
        return EXIT_OK
    from utils.training.loop import StopRequest, Trainer
    from utils.training.run_folder import held_run

    stop = StopRequest()
    # Another run in the folder is better known before data are made and weights are read.
    with held_run(config.output, cpu=args.device == "cpu"):
        with _stop_on_signals(stop):
            trainer = Trainer(config, device=args.device, stop=stop)
            outcome = trainer.run(None if args.max_minutes is None else 60 * args.max_minutes, args.stage)
        result = {"outcome": outcome, "output": config.output, "steps": trainer.progress.global_step}
        result |= {"total_steps": config.total_steps, "skipped": trainer.progress.skipped}
        if outcome == "done" and not args.no_export and trainer.accelerator.is_main_process:
            from utils.training.export import export_pair

            result["model"] = str(export_pair(config))
    if trainer.accelerator.is_main_process:
        # A run that went by the clock is done before its steps are.
        planned = outcome != "done" or result["steps"] == result["total_steps"]
        steps = f"{result['steps']} of {result['total_steps']} steps" if planned else f"{result['steps']} steps"
        text = f"{outcome}: {steps} in {config.output}"
        text += f"; model in {result['model']}" if "model" in result else ""
        _print(result if args.json else text, args.json)
    return EXIT_INTERRUPTED if stop.by_keyboard else EXIT_OK


def _read_config(args: argparse.Namespace) -> TrainConfig:
    import dataclasses

    from utils.training.config import load_config

    if args.max_minutes is not None and args.max_minutes <= 0:
        raise ConfigError(f"--max-minutes must be above 0, got {args.max_minutes}")
    config = load_config(args.config)
    if args.stage is not None and not 0 <= args.stage < len(config.stages):
        raise ConfigError(f"--stage {args.stage}: the configuration has the stages 0 to {len(config.stages) - 1}")
    if args.output:
        config = dataclasses.replace(config, output=args.output)
    return config


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


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        sys.stdout.write(f"{value}\n")


if __name__ == "__main__":
    raise SystemExit(main())
