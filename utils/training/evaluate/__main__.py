"""`python -m utils.training.evaluate`: a checkpoint on held-out code, beside text of the same budgets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.checkpoint.settings import DTYPE_NAMES
from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.compress.arms import ALL

# The questions. `reconstruct` writes whole memories out, which takes as long as they are.
TASKS = "lookup,needle,which_file"


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.evaluate`."""
    parser = make_parser(
        "Measure what a checkpoint answers from compressed memory, beside the full text and other ways to shorten it.",
        examples="""\
  uv run python -m utils.training.evaluate --num-examples 50 --output artifacts/evaluation/default
  uv run python -m utils.training.evaluate --tasks lookup --arms none,full,bm25,expand --chunk-size 8
  uv run python -m utils.training.evaluate --arms all --memory-tokens 192-256,900-1100,3500-4000 --seed 1000,1001,1002
  uv run python -m utils.training.evaluate --checkpoint artifacts/training/toy/model --source symbols \\
      --tasks copy_symbols,find_symbol --memory-tokens 4-12 --chars-per-token 1 --chunk-size 1""",
        prog="python -m utils.training.evaluate",
    )
    parser.add_argument("--checkpoint", help="folder, run folder or hub id; default: the embedded one")
    parser.add_argument("--reference", help="another checkpoint, answering from full text only; `untrained`: the start")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>; default auto")
    parser.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPE_NAMES)}; default auto: as stored, "
                        "float32 on a CPU without bfloat16")  # fmt: skip
    data = parser.add_argument_group("examples")
    data.add_argument("--tasks", default=TASKS, help=f"default {TASKS}; all are listed in docs/training.md")
    data.add_argument("--num-examples", type=int, default=50, help="of each task, length and seed; default 50")
    data.add_argument(
        "--memory-tokens",
        default="192-256",
        help="shortest and longest, roughly; several, as 192-256,900-1100, each judged by itself; default 192-256",
    )
    data.add_argument("--chars-per-token", type=float, default=3.2, help="what lengths reckon with; default 3.2")
    data.add_argument("--source", default="held-out", help="held-out, symbols or a folder of code; default held-out")
    data.add_argument("--question-first", action="store_true", help="ask before the memory; default: after it")
    data.add_argument("--seed", default="1000", help="of the examples; several, as 1000,1001; default 1000")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--arms",
        default="all",
        help=f"default all: {','.join(ALL)}; there is also answer: text selected by the answer, for evaluation only",
    )
    run.add_argument(
        "--chunk-size",
        "--chunk-sizes",
        dest="chunk_sizes",
        default="4,8,16",
        help="memory tokens for each decoder row of an arm, several; default 4,8,16",
    )
    run.add_argument(
        "--batch-size",
        type=int,
        help="prompts generated together; default: by their length, 8 at most, on a GPU 128",
    )
    run.add_argument("--threads", type=int, help="torch threads; default: torch's choice")
    run.add_argument(
        "--output",
        type=Path,
        help="folder for report.html, table.md, result.png, result.json and records.jsonl; what was killed goes on",
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from utils.training.evaluate import run

    result, table = run.run(args)
    if args.json:
        print_json(result)
    else:
        sys.stdout.write(table + "\n")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
