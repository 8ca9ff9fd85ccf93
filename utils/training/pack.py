"""`python -m utils.training.pack`: the trained part of a run as small files that a repository can hold.

The embedded default checkpoint merges what it finds in `utils/checkpoint/default/weights/` when it is assembled.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from utils.checkpoint.default.recipe import TRAINED_FOLDER
from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.training.config import load_config


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.pack`."""
    parser = make_parser(
        "Write the trained part of a run as files of at most 15 MB, for the repository.",
        examples="  uv run python -m utils.training.pack --config utils/training/configs/cpu_default.yaml",
        prog="python -m utils.training.pack",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--run-output", help="folder of the run; default: the one in the configuration")
    where = "folder to write; default utils/checkpoint/default/weights"
    parser.add_argument("--output", "--target", type=Path, default=TRAINED_FOLDER, help=where)
    parser.add_argument("--card", type=Path, help="model card (Markdown) to put beside; default: keep the one there")
    parser.add_argument("--json", action="store_true", help="the manifest as one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from utils.training.export import pack_run

    config = load_config(args.config)
    if args.run_output:
        config = dataclasses.replace(config, output=args.run_output)
    manifest = pack_run(config, args.output, args.card.read_text(encoding="utf-8") if args.card else "")
    if args.json:
        print_json(manifest)
    else:
        sizes = f"{manifest['size_bytes'] / 1e6:.1f} MB in {len(manifest['files'])} files"
        sys.stdout.write(f"wrote {args.output}: {sizes}, chunk sizes {manifest['chunk_sizes']}\n")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
