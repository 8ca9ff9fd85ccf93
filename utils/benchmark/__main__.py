"""`python -m utils.benchmark NAME`: measured beside ideal; a table, and one JSON line last.

Compare the ratios inside one run, not seconds between runs: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import importlib

from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.files import write_text

BENCHMARKS = ("encode", "cache", "gateway")


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command: one subcommand a benchmark."""
    parser = make_parser(
        "Measure speed beside its limit.",
        examples="""\
  uv run python -m utils.benchmark encode
  uv run python -m utils.benchmark encode --tokens 4096 --spans 1 50 --repeats 3 --dtype float32""",
        prog="python -m utils.benchmark",
    )
    subcommands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name in BENCHMARKS:
        module = importlib.import_module(f"utils.benchmark.{name}")
        sub = subcommands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION)
        module.add_arguments(sub)
        sub.add_argument("--output", help="also write table and JSON to this markdown file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    import json

    table, result = importlib.import_module(f"utils.benchmark.{args.benchmark}").run(args)
    print(table)
    print_json(result)
    if args.output:
        details = json.dumps(result, indent=1, ensure_ascii=False)
        write_text(args.output, f"# {args.benchmark}\n\n{table}\n\n```json\n{details}\n```\n")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
