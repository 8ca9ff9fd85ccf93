"""`python -m utils.benchmark NAME`: measured beside ideal; a table, and one JSON line last.

Compare the ratios inside one run, not seconds between runs: machines are shared and noisy. A benchmark is a module with
`DESCRIPTION`, `QUICK` (smaller defaults), `add_arguments(parser)`, `run(args)` and, where it draws, `figures(result)`.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from utils.cli import EXIT_OK, make_parser, print_json, run_command

BENCHMARKS = ("encode", "ttft", "memory", "cache", "load", "generate", "pooling", "training", "ruler", "gateway", "all")
_QUICK_FLAG = "--quick"


def build_parser(quick: bool = False) -> argparse.ArgumentParser:
    """Flags of the command: one subcommand a benchmark.

    Args:
        quick: With the smaller defaults.
    """
    parser = make_parser(
        "Measure speed beside its limit.",
        examples="""\
  uv run python -m utils.benchmark encode
  uv run python -m utils.benchmark encode --tokens 4096 --spans 1 50 --repeats 3 --dtype float32
  uv run python -m utils.benchmark ttft --tokens 1024 --also-tokens 2048 4096 --output artifacts/ttft
  uv run python -m utils.benchmark all --quick""",
        prog="python -m utils.benchmark",
    )
    subcommands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name in BENCHMARKS:
        module = importlib.import_module(f"utils.benchmark.{name}")
        sub = subcommands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION)
        module.add_arguments(sub)
        sub.add_argument(_QUICK_FLAG, action="store_true", help="small sizes: does it work, not how fast it is")
        if name != "all":
            sub.add_argument("--output", help="also write result.json, table.md and pictures to this folder")
        if quick:
            sub.set_defaults(**module.QUICK)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(build_parser(_QUICK_FLAG in argv), _run, argv)


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"utils.benchmark.{args.benchmark}")
    table, result = module.run(args)
    print(table)
    if args.output and args.benchmark != "all":
        from utils.benchmark.results import write_results

        pictures = module.figures(result) if hasattr(module, "figures") else {}
        write_results(args.output, args.benchmark, table, result, pictures)
    print_json(result)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
