"""`python -m utils.training.pack`: the trained part of a run as small files that a repository can hold.

LoRA stays unmerged and everything is stored in bfloat16. The embedded default checkpoint merges what it finds in
`utils/checkpoint/default/weights/` when it is assembled.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from utils.training.config import TrainConfig

MAX_FILE_BYTES = 15_000_000
MAX_TOTAL_BYTES = 40_000_000
# Of a run's progress.
_RUN = ("global_step", "labels", "seconds", "skipped")


def pack_run(config: TrainConfig, target: Path, card: str = "") -> dict[str, Any]:
    """Write the trained part of a run's newest checkpoint.

    Args:
        config: The run.
        target: Folder; an older part there is replaced when the new one is whole.
        card: Model card, Markdown; the folder's own is kept without it.

    Returns:
        The manifest, as written.

    Raises:
        CheckpointError: There is no checkpoint, or the part is larger than a repository should hold.
    """
    from safetensors.torch import save_file

    from utils.checkpoint.default.trained_part import CARD, MANIFEST
    from utils.files import atomic_folder, provenance, sha256_file, write_json, write_text
    from utils.locks import LOCK_FILE, remove_leftovers, sole_writer
    from utils.training.checkpoints import load_trained, whole_checkpoint
    from utils.training.export import trained_chunk_sizes
    from utils.training.parts import lora_scales

    found = whole_checkpoint(config)
    if found is None:
        raise CheckpointError(f"{config.output} has no checkpoint yet: train first")
    checkpoint, progress = found
    state = _small(load_trained(checkpoint))
    total = sum(t.nbytes for t in state.values())
    if total > MAX_TOTAL_BYTES:
        raise CheckpointError(
            f"the trained part has {total / 1e6:.1f} MB, at most {MAX_TOTAL_BYTES / 1e6:.0f} are packed: train with a "
            "smaller LoRA rank, or the encoder by LoRA"
        )
    card = card or ((target / CARD).read_text(encoding="utf-8") if (target / CARD).is_file() else "")
    # The lock lies beside the folder, which is replaced whole.
    with sole_writer(target, lock=target.parent / f".{target.name}{LOCK_FILE}") as held:
        if held:
            remove_leftovers(target.parent, glob.escape(target.name))
        with atomic_folder(target, holds=(MANIFEST, CARD, "part-*.safetensors")) as folder:
            files = {}
            for number, shard in enumerate(_shards(state)):
                name = f"part-{number:02d}.safetensors"
                save_file(shard, folder / name)
                files[name] = sha256_file(folder / name)
            manifest = {
                "files": files,
                "size_bytes": total,
                "lora_scales": lora_scales(config),
                "chunk_sizes": list(trained_chunk_sizes(config)),
                # What the run went on from, so that no hour is forgotten; runs from before `pair.trained` do not say.
                "run": {**{key: getattr(progress, key) for key in _RUN}, "started_from": progress.started_from},
                "config": config.what_is_trained(),
                "provenance": provenance(),
            }
            write_json(folder / MANIFEST, manifest)
            if card:
                write_text(folder / CARD, card)
    return manifest


def _small(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(state.items())}


def _shards(state: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Split by size, in order; a file's header takes a little room too."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in state.items():
        size = tensor.nbytes + 200
        if shards[-1] and used + size > MAX_FILE_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.pack`."""
    parser = make_parser(
        "Write the trained part of a run as files of at most 15 MB, for the repository.",
        examples="  uv run python -m utils.training.pack --config utils/training/configs/cpu_default.yaml",
        prog="python -m utils.training.pack",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--run-output", help="folder of the run; default: the one in the configuration")
    parser.add_argument("--target", type=Path, help="folder to write; default utils/checkpoint/default/weights")
    parser.add_argument("--card", type=Path, help="model card (Markdown) to put beside; default: keep the one there")
    parser.add_argument("--json", action="store_true", help="the manifest as one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    import dataclasses

    from utils.checkpoint.default.recipe import TRAINED_FOLDER
    from utils.training.config import load_config

    config = load_config(args.config)
    if args.run_output:
        config = dataclasses.replace(config, output=args.run_output)
    target = args.target or TRAINED_FOLDER
    card = args.card.read_text(encoding="utf-8") if args.card else ""
    manifest = pack_run(config, target, card)
    if args.json:
        print_json(manifest)
    else:
        sizes = f"{manifest['size_bytes'] / 1e6:.1f} MB in {len(manifest['files'])} files"
        sys.stdout.write(f"wrote {target}: {sizes}, chunk sizes {manifest['chunk_sizes']}\n")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
