"""RULER's `prepare.py`: generate one task at one length, with the reference's flags.

Writes `<save_dir>/<task>/<subset>.jsonl`. `python -m ruler prepare` does the same for many tasks and lengths.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ruler.generation.generate import recipe_from
from ruler.generation.prepare import DatasetJob, add_prepare_arguments, run_jobs
from ruler.registry import get_task
from utils.cli import make_parser, run_command
from utils.errors import ConfigError

EXAMPLES = """\
  prepare.py --save_dir data --benchmark synthetic --task niah_single_2 --tokenizer_path models/Qwen3-4B \\
      --tokenizer_type hf --max_seq_length 131072 --model_template_type base --num_samples 20"""


def build_parser() -> argparse.ArgumentParser:
    """Declare the reference's flags and ours."""
    parser = make_parser("Generate one RULER task at one length, with the reference's flags.", EXAMPLES)
    parser.add_argument("--save-dir", "--save_dir", type=Path, required=True,
                        help="the rows go to <save_dir>/<task>/<subset>.jsonl")  # fmt: skip
    parser.add_argument("--benchmark", default="synthetic", choices=("synthetic",), help="(default: synthetic)")
    parser.add_argument("--task", required=True, help="task name")
    parser.add_argument("--max-seq-length", "--max_seq_length", type=int, required=True,
                        help="budget in tokens, prompt and answer")  # fmt: skip
    parser.add_argument("--chunk-idx", "--chunk_idx", type=int, default=0, help="which chunk to make (default: 0)")
    parser.add_argument("--chunk-amount", "--chunk_amount", type=int, default=1, help="number of chunks (default: 1)")
    add_prepare_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the dataset, or one chunk of it."""
    task = get_task(args.task)
    if not 0 <= args.chunk_idx < args.chunk_amount:
        raise ConfigError(f"--chunk_idx must be 0 to {args.chunk_amount - 1}, got {args.chunk_idx}")
    share, rest = divmod(args.num_samples, args.chunk_amount)
    first = share * args.chunk_idx + min(args.chunk_idx, rest)
    recipe = recipe_from(
        args,
        task.name,
        args.max_seq_length,
        num_samples=share + (args.chunk_idx < rest),
        first=first,
        # Rows with streams of their own are told apart by their number already.
        seed=args.seed + (0 if args.mode == "balanced" else args.chunk_idx),
    )
    return run_jobs([DatasetJob(recipe=recipe, folder=args.save_dir / task.name, subset=args.subset)], args)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
