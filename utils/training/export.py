"""A trained run as a checkpoint in the native layout: LoRA merged, marker rows added, chunk sizes noted."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from utils.checkpoint.save import save_checkpoint
from utils.errors import CheckpointError
from utils.training.checkpoints import load_trained, whole_checkpoint
from utils.training.config import TrainConfig
from utils.training.pairs import starting_pair
from utils.training.parts import apply_trained_state
from utils.training.run_folder import MODEL_FOLDER

logger = logging.getLogger(__name__)


def trained_chunk_sizes(config: TrainConfig) -> tuple[int, ...]:
    """The chunk sizes that the last stage trained for."""
    return tuple(sorted(size for size, weight in config.stages[-1].chunk_sizes.items() if weight))


def export_pair(config: TrainConfig, target: str | Path | None = None) -> Path:
    """Write the newest whole checkpoint of a run as a whole model pair, in the pair's own dtype.

    Args:
        config: The run.
        target: Folder; `model/` in the run's output by default.

    Raises:
        CheckpointError: The run has no checkpoint yet, or none that is whole.
    """
    found = whole_checkpoint(config)
    if found is None:
        raise CheckpointError(f"{config.output} has no checkpoint yet: train first")
    checkpoint, _ = found
    folder = Path(target) if target else Path(config.output) / MODEL_FOLDER
    model, tokenizers = starting_pair(config.pair, config.seed)
    apply_trained_state(model, load_trained(checkpoint), config, tokenizers.markers)
    sizes = trained_chunk_sizes(config)
    chosen = model.config.chunk_size if model.config.chunk_size in sizes else sizes[0]
    compression = dataclasses.replace(model.config, chunk_sizes=()).with_chunk_size(chosen)
    model.code_chunker.config = dataclasses.replace(compression, chunk_sizes=sizes)
    save_checkpoint(folder, model, tokenizers)
    logger.info("wrote %s from %s", folder, checkpoint.name)
    return folder
