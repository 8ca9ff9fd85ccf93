"""Find a checkpoint: the embedded default, a folder, the newest of a training run, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from utils.checkpoint.default.assemble import assemble_default_checkpoint
from utils.checkpoint.layout import CheckpointFiles, newest_child, open_checkpoint
from utils.checkpoint.lora import HUB_ID
from utils.errors import CheckpointError
from utils.files import check_name
from utils.pretrained import fetch


def find_checkpoint(path_or_id: str | Path | None = None, chunk_size: int | None = None) -> CheckpointFiles:
    """Find a checkpoint and check that it is whole.

    Args:
        path_or_id: A checkpoint folder; a run folder whose children are `checkpoint_<int>…` (the largest is taken and
            named in the log); a Hugging Face hub id `org/name`; None for the embedded default.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.

    Raises:
        CheckpointError: Nothing there, or something is missing in it.
        ConfigError: The checkpoint cannot serve this chunk size, or does not say its own and none was given; or its
            name is not UTF-8.
    """
    return open_checkpoint(newest_child(_local_folder(path_or_id)), chunk_size)


def _local_folder(path_or_id: str | Path | None) -> Path:
    if path_or_id is None:
        return assemble_default_checkpoint()
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        check_name(path)
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the checkpoint's folder")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"{path} does not exist: give a checkpoint folder or a hub id such as org/name")
    return fetch(str(path_or_id), patterns=None)
