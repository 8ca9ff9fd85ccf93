"""Say what a checkpoint is, and whether it is whole: `python -m utils.checkpoint.describe PATH`.

Opens headers and configurations only, so it is quick on a checkpoint of any size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.lora import base_or_self, is_peft_folder
from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.pretrained import read_config


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Check a checkpoint folder and describe it: layout, sizes, how it compresses.",
        examples="""\
  uv run python -m utils.checkpoint.describe
  uv run python -m utils.checkpoint.describe runs/pair --chunk-size 16 --json""",
        prog="python -m utils.checkpoint.describe",
    )
    parser.add_argument("path", nargs="?", help="folder, run folder or hub id; default: the embedded default")
    parser.add_argument("--chunk-size", "--chunk_size", type=int, help="encoder tokens per latent")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    files = find_checkpoint(args.path, args.chunk_size)
    result: dict[str, Any] = {
        "root": str(files.root),
        "layout": files.layout.name,
        "config": files.config.to_json(),
        "encoder": _part(files.encoder),
        "decoder": _part(files.decoder),
        "fingerprint": files.fingerprint,
    }
    if args.json:
        print_json(result)
        return EXIT_OK
    print(f"{files.root} ({files.layout.name} layout), complete")
    for name in ("encoder", "decoder"):
        part = result[name]
        print(
            f"{name}: {part['model_type']}, {part['layers']} layers of width {part['width']}, "
            f"{part['positions']} positions, {part['size_bytes'] / 1e6:.0f} MB"
        )
    for key, value in result["config"].items():
        print(f"{key}: {value}")
    print(f"fingerprint: {files.fingerprint}")
    return EXIT_OK


def _part(folder: Path) -> dict[str, Any]:
    config = read_config(base_or_self(folder))
    return {
        "model_type": config.model_type,
        "layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "positions": getattr(config, "max_position_embeddings", None),
        "lora": is_peft_folder(folder),
        "size_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


if __name__ == "__main__":
    raise SystemExit(main())
