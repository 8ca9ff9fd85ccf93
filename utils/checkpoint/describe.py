"""Say what a checkpoint is, and whether it is whole: `python -m utils.checkpoint.describe PATH`.

Opens headers and configurations only, so it is quick on a checkpoint of any size.
"""

from __future__ import annotations

import argparse
from typing import Any

from utils.cli import EXIT_OK, make_parser, print_json, run_command


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
    from utils.checkpoint.locate import find_checkpoint

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
    print_lines = [f"{files.root} ({files.layout.name} layout), complete"]
    for name in ("encoder", "decoder"):
        part = result[name]
        print_lines.append(
            f"{name}: {part['model_type']}, {part['layers']} layers of width {part['width']}, "
            f"{part['positions']} positions, {part['size_bytes'] / 1e6:.0f} MB"
        )
    print_lines += [f"{key}: {value}" for key, value in result["config"].items()]
    print_lines.append(f"fingerprint: {files.fingerprint}")
    print("\n".join(print_lines))
    return EXIT_OK


def _part(folder: Any) -> dict[str, Any]:
    from utils.checkpoint.lora import base_of, is_peft_folder
    from utils.pretrained import read_config

    config = read_config(base_of(folder) if is_peft_folder(folder) else folder)
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
