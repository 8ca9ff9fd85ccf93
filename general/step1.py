"""Compress a chat prompt: messages with memory markers → prompt embeddings in a file.

    uv run python general/step1.py --prompt-file messages.json --output artifacts/prompt_embeddings.npy

The decoder's chat template is applied; `general/generation_test.py` sends the file to a server.
"""

from __future__ import annotations

import argparse
from typing import Any

from general.compress_command import EXAMPLE, add_flags, compress_and_save
from utils.cli import make_parser, run_command
from utils.errors import DatasetError
from utils.files import read_json

PROMPT = [{"role": "user", "content": EXAMPLE}]


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Compress the memory of a chat prompt into latents and save the prompt embeddings.",
        examples="""\
  uv run python general/step1.py
  uv run python general/step1.py --prompt-file messages.json --chunk-size 4
  uv run python general/step1.py --checkpoint latent-context/0.6b-4b-LCLM-16x --device cuda""",
    )
    parser.add_argument(
        "--prompt-file", "--prompt_file", help='JSON [{"role", "content"}, …]; default: a built-in prompt'
    )
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    messages = _read_messages(args.prompt_file) if args.prompt_file else PROMPT
    return compress_and_save(args, messages, {"--prompt-file": args.prompt_file})


def _read_messages(path: str) -> list[Any]:
    messages = read_json(path)
    if isinstance(messages, dict):
        messages = messages.get("messages")
    if not isinstance(messages, list):
        raise DatasetError(
            f'{path}: expected a list of messages [{{"role": …, "content": …}}], or that under "messages"'
        )
    return messages


if __name__ == "__main__":
    raise SystemExit(main())
