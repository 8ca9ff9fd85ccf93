"""Write a checkpoint from a trainer's state, or in the other layout: `python -m utils.checkpoint.convert`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from utils.checkpoint.layout import LAYOUTS
from utils.checkpoint.settings import DTYPE_NAMES, StateOptions
from utils.cli import EXIT_OK, make_parser, print_json, run_command


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Write a checkpoint from a trainer's state (DeepSpeed, FSDP, .bin, safetensors) or in another layout.",
        examples="""\
  uv run python -m utils.checkpoint.convert pairs/mine pairs/mine-lclm --layout lclm
  uv run python -m utils.checkpoint.convert runs/a/checkpoint_3 pairs/a --base pairs/start
  uv run python -m utils.checkpoint.convert runs/a/lora pairs/a --base pairs/start --decoder-lora-alpha 64""",
        prog="python -m utils.checkpoint.convert",
    )
    parser.add_argument("source", help="a trainer's checkpoint folder or weight file; or a checkpoint, without --base")
    parser.add_argument("output", help="folder of the new checkpoint")
    parser.add_argument("--base", help="checkpoint (folder or hub id) that the training started from")
    parser.add_argument(
        "--layout", choices=[x.name for x in LAYOUTS], default=LAYOUTS[0].name, help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="stored", help="default: as the base is stored")
    parser.add_argument("--chunk-size", "--chunk_size", type=int, help="encoder tokens per latent; default: its own")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("state")
    formats = ("auto", "deepspeed", "fsdp", "safetensors", "bin")
    group.add_argument("--format", choices=formats, default="auto", help="default auto: the one that is there")
    for part in ("encoder", "decoder"):
        group.add_argument(f"--{part}-lora-alpha", type=float, metavar="A", help=f"of the {part}'s LoRA weights")
    group.add_argument(
        "--frozen-from-base", action="store_true", help="parameters that the state lacks are the base's, and counted"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from utils.checkpoint.convert.conversion import convert

    alphas = {"encoder": args.encoder_lora_alpha, "decoder": args.decoder_lora_alpha}
    options = StateOptions(
        format=args.format,
        lora_alpha={part: alpha for part, alpha in alphas.items() if alpha is not None},
        frozen_from_base=args.frozen_from_base,
    )
    result = convert(
        args.source,
        args.output,
        base=args.base,
        layout=next(layout for layout in LAYOUTS if layout.name == args.layout),
        dtype=args.dtype,
        chunk_size=args.chunk_size,
        options=options,
        overwrite=args.overwrite,
    )
    if args.json:
        print_json(dataclasses.asdict(result))
        return EXIT_OK
    text = f"{result.output} ({result.layout} layout) from {result.source} ({result.format})\n"
    if args.base is not None:
        text += f"{result.tensors} tensors, {result.lora_layers} LoRA layers merged, {result.from_base} from the base\n"
    sys.stdout.write(text)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
