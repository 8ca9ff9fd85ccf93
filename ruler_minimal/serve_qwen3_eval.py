"""Evaluate a chat server on a light dataset sent as text: generate, ask, save the predictions, score."""

from __future__ import annotations

import argparse
import sys

from ruler_minimal.evaluation import add_evaluation_arguments, chat_settings, run_evaluation
from utils.cli import make_parser, run_command

EXAMPLES = """\
  uv run python ruler_minimal/serve_qwen3_eval.py --task niah --num-samples 10 --server-url http://127.0.0.1:8001 \\
      --model-name Qwen/Qwen3-4B-Instruct-2507 --work-dir work/text"""


def build_parser() -> argparse.ArgumentParser:
    """Declare the published flags."""
    parser = make_parser("Evaluate a chat server on a light dataset sent as text.", EXAMPLES, verbose_rows=True)
    add_evaluation_arguments(parser, "work/text")
    return parser


def run(args: argparse.Namespace) -> int:
    """Answer and score."""
    return run_evaluation(args, chat_settings(args, name="server-text", model=args.model_name))


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
