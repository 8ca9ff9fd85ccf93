"""Compress a plain text prompt: text with memory markers → prompt embeddings in a file, no chat template.

uv run python general/step1_raw_text.py --memory utils/model/prompt.py --text "What is num_latents?"
uv run python general/step1_raw_text.py --text "Explain <|memory_start|>def f(): return 1<|memory_end|>"
cat prompt.txt | uv run python general/step1_raw_text.py -
"""

from __future__ import annotations

import argparse
import sys

from general.compress_command import add_flags, compress_and_save, read_text
from utils.cli import make_parser, run_command
from utils.errors import PromptError
from utils.model.markers import MARKERS, wrap


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Compress the memory of a text prompt into latents and save the prompt embeddings.",
        examples="""\
  uv run python general/step1_raw_text.py --memory utils/model/prompt.py --text "What is num_latents?"
  uv run python general/step1_raw_text.py --text "Explain <|memory_start|>def f(): return 1<|memory_end|>"
  cat prompt.txt | uv run python general/step1_raw_text.py - --chunk-size 4""",
    )
    source = parser.add_argument_group("prompt")
    one = source.add_mutually_exclusive_group()
    one.add_argument("--text", help="the prompt, with 0..n marked spans")
    one.add_argument("--input-file", "--input_file", help="file that holds the prompt; - for standard input")
    one.add_argument("stdin", nargs="?", choices=("-",), metavar="-", help="read the prompt from standard input")
    source.add_argument(
        "--memory", nargs="+", default=[], metavar="FILE", help="plain files, each a span of its own before the prompt"
    )
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    text = "".join(_marked(path) for path in args.memory) + _prompt_text(args)
    if not text:
        raise PromptError("there is no prompt: pass --text, --input-file, - for standard input, or --memory")
    inputs = {"--memory": args.memory, "--input-file": None if args.input_file == "-" else args.input_file}
    return compress_and_save(args, lambda compressor: compressor.parse_raw(text, args.chunk_size), inputs)


def _prompt_text(args: argparse.Namespace) -> str:
    if args.stdin or args.input_file == "-":
        data = sys.stdin.buffer.read()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 text (byte {error.start})") from None
    return read_text(args.input_file) if args.input_file else args.text or ""


def _marked(path: str) -> str:
    content = read_text(path)
    if not content:
        raise PromptError(f"{path} is empty: there is nothing to compress")
    for marker in MARKERS:
        if marker in content:
            raise PromptError(f"{path} holds the marker {marker}: a memory file is plain text; pass it as --input-file")
    return f"{wrap(content)}\n"


if __name__ == "__main__":
    raise SystemExit(main())
