"""Evaluate a light dataset with its memories compressed: by a vLLM server that takes prompt embeddings, or locally."""

from __future__ import annotations

import argparse
import sys

from ruler_minimal.evaluation import add_evaluation_arguments, chat_settings, run_evaluation
from utils.cli import make_parser, run_command
from utils.flags import add_expand_flags, expansion

EXAMPLES = """\
  uv run python ruler_minimal/eval_with_memory.py --task variable_tracking --num-samples 10 --chunk-size 8 \\
      --server-url http://127.0.0.1:8000 --work-dir work/memory
  uv run python ruler_minimal/eval_with_memory.py --local --num-samples 2 --max-seq-length 400"""


def build_parser() -> argparse.ArgumentParser:
    """Declare the published flags, and `--local`."""
    parser = make_parser("Evaluate a light dataset with its memories compressed.", EXAMPLES, verbose_rows=True)
    add_evaluation_arguments(parser, "work/memory")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--checkpoint", "--model-path", help="Code-LLaVA checkpoint (default: the embedded one)")
    memory.add_argument("--chunk-size", type=int, help="encoder tokens a latent (default: the checkpoint's)")
    memory.add_argument("--device", default="auto", help="of the encoder (default: auto)")
    add_expand_flags(parser)
    memory.add_argument("--local", action="store_true", help="answer with the checkpoint's decoder, without a server")
    return parser


def run(args: argparse.Namespace) -> int:
    """Answer and score."""
    settings = chat_settings(
        args,
        name="local-memory" if args.local else "server-memory",
        model=args.checkpoint if args.local else args.model_name,
        checkpoint=args.checkpoint,
        chunk_size=args.chunk_size,
        expansion=expansion(args),
        device=args.device,
    )
    return run_evaluation(args, settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
