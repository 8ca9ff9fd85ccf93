"""Compress a plain text prompt: text with memory markers → prompt embeddings in a file, no chat template.

uv run python general/step1_raw_text.py --memory docs/sample/store.py --text "What does the function load return?"
uv run python general/step1_raw_text.py --text "Explain <|memory_start|>def f(): return 1<|memory_end|>"
cat prompt.txt | uv run python general/step1_raw_text.py -
"""

from __future__ import annotations

import argparse
import sys

from general.compress_command import EXAMPLE, add_flags, compress_and_save
from utils.cli import make_parser, run_command
from utils.errors import PromptError
from utils.flags import add_memory_files_flag, decode_bytes, read_memory_files, read_text


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Compress the memory of a text prompt into latents and save the prompt embeddings.",
        examples="""\
  uv run python general/step1_raw_text.py
  uv run python general/step1_raw_text.py --memory docs/sample/store.py --text "What does the function load return?"
  uv run python general/step1_raw_text.py --text "Explain <|memory_start|>def f(): return 1<|memory_end|>"
  cat prompt.txt | uv run python general/step1_raw_text.py - --chunk-size 4""",
    )
    source = parser.add_argument_group("prompt")
    one = source.add_mutually_exclusive_group()
    one.add_argument("--text", help="the prompt, with 0..n marked spans; default: a built-in one")
    one.add_argument("--input-file", "--input_file", help="file that holds the prompt; - for standard input")
    one.add_argument("stdin", nargs="?", choices=("-",), metavar="-", help="read the prompt from standard input")
    add_memory_files_flag(source)
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    inputs = {"--memory": args.memory, "--input-file": None if args.input_file == "-" else args.input_file}
    prompt = read_memory_files(args.memory) + _prompt_text(args)
    if not prompt:
        raise PromptError("the prompt is empty: fill --text, --input-file or standard input, or name a --memory file")
    return compress_and_save(args, prompt, inputs)


def _prompt_text(args: argparse.Namespace) -> str:
    if args.stdin or args.input_file == "-":
        return decode_bytes(sys.stdin.buffer.read(), "standard input")
    if args.input_file:
        return read_text(args.input_file)
    if args.text is None and not args.memory:
        return EXAMPLE
    return args.text or ""


if __name__ == "__main__":
    raise SystemExit(main())
