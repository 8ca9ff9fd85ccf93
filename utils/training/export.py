"""What a run has trained, for others: a whole pair in the native layout, or its trained part as small files."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from utils.checkpoint.default.trained_part import CARD, MANIFEST
from utils.checkpoint.save import save_checkpoint
from utils.errors import CheckpointError
from utils.files import atomic_folder, provenance, sha256_file, write_json, write_text
from utils.locks import LOCK_FILE, sole_writer
from utils.training.checkpoints import Progress, load_trained, whole_checkpoint
from utils.training.config import TrainConfig
from utils.training.pairs import starting_pair
from utils.training.parts import apply_trained_state, lora_scales
from utils.training.run_folder import MODEL_FOLDER

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 15_000_000
MAX_TOTAL_BYTES = 40_000_000


def export_pair(config: TrainConfig, target: str | Path | None = None) -> Path:
    """Write the newest whole checkpoint of a run as a whole model pair, LoRA merged, in the pair's own dtype.

    Args:
        config: The run.
        target: Folder; `model/` in the run's output by default.

    Raises:
        CheckpointError: The run has no checkpoint yet, or none that is whole.
    """
    checkpoint, _ = _newest(config)
    folder = Path(target) if target else Path(config.output) / MODEL_FOLDER
    model, tokenizers = starting_pair(config.pair, config.seed)
    apply_trained_state(model, load_trained(checkpoint), config, tokenizers.markers)
    sizes = config.trained_chunk_sizes
    chosen = model.config.chunk_size if model.config.chunk_size in sizes else sizes[0]
    compression = dataclasses.replace(model.config, chunk_sizes=()).with_chunk_size(chosen)
    model.code_chunker.config = dataclasses.replace(compression, chunk_sizes=sizes)
    save_checkpoint(folder, model, tokenizers)
    logger.info("wrote %s from %s", folder, checkpoint.name)
    return folder


def pack_run(config: TrainConfig, target: Path, card: str = "") -> dict[str, Any]:
    """Write the trained part of a run's newest whole checkpoint: LoRA unmerged, in bfloat16.

    Args:
        config: The run.
        target: Folder; an older part there is replaced when the new one is whole.
        card: Model card, Markdown; the folder's own is kept without it.

    Returns:
        The manifest, as written.

    Raises:
        CheckpointError: There is no checkpoint, or the part is larger than a repository should hold.
    """
    checkpoint, progress = _newest(config)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(load_trained(checkpoint).items())}
    total = sum(tensor.nbytes for tensor in state.values())
    if total > MAX_TOTAL_BYTES:
        raise CheckpointError(
            f"the trained part has {total / 1e6:.1f} MB, at most {MAX_TOTAL_BYTES / 1e6:.0f} are packed: train with a "
            "smaller LoRA rank, or the encoder by LoRA"
        )
    card = card or ((target / CARD).read_text(encoding="utf-8") if (target / CARD).is_file() else "")
    # The lock lies beside the folder, which is replaced whole.
    with (
        sole_writer(target, lock=target.parent / f".{target.name}{LOCK_FILE}"),
        atomic_folder(target, holds=(MANIFEST, CARD, "part-*.safetensors")) as folder,
    ):
        files = {}
        for number, shard in enumerate(_shards(state)):
            name = f"part-{number:02d}.safetensors"
            save_file(shard, folder / name)
            files[name] = sha256_file(folder / name)
        # `started_from`: what the run went on from, so that no hour is forgotten.
        run = {key: getattr(progress, key) for key in ("global_step", "labels", "seconds", "skipped", "started_from")}
        manifest = {
            "files": files,
            "size_bytes": total,
            "lora_scales": lora_scales(config),
            "chunk_sizes": list(config.trained_chunk_sizes),
            "run": run,
            "config": config.what_is_trained(),
            "provenance": provenance(),
        }
        write_json(folder / MANIFEST, manifest)
        if card:
            write_text(folder / CARD, card)
    return manifest


def _newest(config: TrainConfig) -> tuple[Path, Progress]:
    found = whole_checkpoint(config)
    if found is None:
        raise CheckpointError(f"{config.output} has no checkpoint yet: train first")
    return found


def _shards(state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
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
