"""`python -m utils.training.train`: run, resume, inspect and export a training run."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from utils.cli import EXIT_INTERRUPTED, EXIT_OK, make_parser, print_json, run_command
from utils.errors import ConfigError
from utils.files import check_name
from utils.training.config import load_config


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.train`."""
    parser = make_parser(
        "Train a pair in stages. Run the same command again to resume.",
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
    if args.max_minutes is not None and args.max_minutes <= 0:
        raise ConfigError(f"--max-minutes must be above 0, got {args.max_minutes}")
    config = load_config(args.config)
    if args.stage is not None and not 0 <= args.stage < len(config.stages):
        raise ConfigError(f"--stage {args.stage}: the configuration has the stages 0 to {len(config.stages) - 1}")
    if args.output:
        config = dataclasses.replace(config, output=args.output)
    check_name(config.output)
    from utils.training import session

    result, text, interrupted = session.run(config, args)
    if result and args.json:
        print_json(result)
    elif text:
        sys.stdout.write(f"{text}\n")
    return EXIT_INTERRUPTED if interrupted else EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
