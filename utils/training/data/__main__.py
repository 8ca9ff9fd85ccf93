"""`python -m utils.training.data`: build task examples, tokenise them, report sizes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from utils.cli import EXIT_OK, make_parser, print_json, run_command


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.data`."""
    parser = make_parser(
        "Make training data: task examples from Python sources as JSONL, and their tokenised caches.",
        examples="""\
  uv run python -m utils.training.data build --output artifacts/data --tasks lookup=1000,needle=500
  uv run python -m utils.training.data tokenize artifacts/data
  uv run python -m utils.training.data config utils/training/configs/cpu_default.yaml""",
        prog="python -m utils.training.data",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="write the examples of some tasks, and a report of their sources")
    build.add_argument("--output", type=Path, required=True, help="folder for TASK.jsonl and report.json")
    build.add_argument("--tasks", required=True, help="TASK=NUMBER,…; an unknown task names those there are")
    build.add_argument(
        "--source", default="installed", help="installed, held-out, symbols or a folder; default installed"
    )
    build.add_argument("--memory-tokens", default="64-256", help="shortest and longest, roughly; default 64-256")
    build.add_argument(
        "--lengths",
        choices=("up_to", "log_uniform"),
        default="up_to",
        help="memories are at most as long as drawn, or as long; default up_to",
    )
    build.add_argument("--chars-per-token", type=float, default=3.2, help="what lengths reckon with; default 3.2")
    build.add_argument("--max-files", type=int, help="draw from a random choice of so many files; default: all")
    build.add_argument("--package-weights", help="PACKAGE=NUMBER,…: how many times as often its files are drawn")
    build.add_argument(
        "--question-first", type=float, default=0.0, help="part of the examples that ask before the memory; default 0"
    )
    build.add_argument(
        "--scattered",
        type=float,
        default=0.0,
        help="part of the examples with several spans and text around; default 0",
    )
    build.add_argument("--seed", type=int, default=0, help="default 0")
    build.add_argument("--checkpoint", help="whose decoder answers for the task chat; default: the embedded, untrained")

    tokenize = commands.add_parser("tokenize", help="tokenise a folder of JSONL files, where that is not done yet")
    tokenize.add_argument("folder", type=Path, help="folder with JSONL files")
    tokenize.add_argument("--checkpoint", help="whose tokenizers; default: the embedded checkpoint's")

    config = commands.add_parser("config", help="build and tokenise what a run's configuration asks for")
    config.add_argument("path", type=Path, help="YAML file of the run")

    for command in (build, tokenize, config):
        command.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from utils.training.data import commands

    report = getattr(commands, args.command)(args)
    if args.json:
        print_json(report)
    else:
        sys.stdout.write(_describe(report))
    return EXIT_OK


def _describe(report: dict[str, Any]) -> str:
    """One line a task, and the packages by licence where the report knows them."""
    hidden = ("kinds", "key", "version", "sha256")
    lines = []
    for task, entry in report["tasks"].items():
        shown = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in entry.items() if name not in hidden)
        lines.append(f"{task}: {shown}")
    for name, package in report.get("packages", {}).items():
        lines.append(f"  {name} ({package['licence']}): {package['files']} files, {package['characters']:,} characters")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
