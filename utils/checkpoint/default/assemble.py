"""Assemble the embedded default checkpoint where it is not there yet, once and whole."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from utils.checkpoint.default.recipe import NAME, carried_part, is_trained, recipe_fingerprint
from utils.checkpoint.default.trained_part import TrainedPart
from utils.checkpoint.weight_files import writing
from utils.errors import CheckpointError, CodeLlavaError
from utils.files import PROJECT_ROOT, atomic_folder, write_json
from utils.locks import LOCK_FILE, remove_leftovers, sole_writer
from utils.pretrained import read_settings

logger = logging.getLogger(__name__)

STAMP_FILE = "assembled.json"
# Twice the folder: the trained part is merged into a copy.
_ROOM_BYTES = 800_000_000


def default_checkpoint_path() -> Path:
    """Where the default checkpoint lives: `checkpoints/` of the project, or `$CODE_LLAVA_CHECKPOINTS`."""
    return Path(os.environ.get("CODE_LLAVA_CHECKPOINTS") or PROJECT_ROOT / "checkpoints") / NAME


def assemble_default_checkpoint(*, trained: bool = True) -> Path:
    """Make the default checkpoint if it is not there or out of date.

    Args:
        trained: With the trained part, if the project carries one; without it is where training starts.

    Returns:
        Its folder.

    Raises:
        CheckpointError: There is something to make, and no package with the weights, or no place for it.
    """
    part = carried_part() if trained else None
    target = default_checkpoint_path()
    if is_trained() and not trained:
        target = target.with_name(f"{NAME}-untrained")
    if _is_current(target, part):
        return target
    try:
        _assemble_into(target, part)
    except OSError as error:
        # Of one without a number nothing is known.
        if error.errno is None:
            raise
        raise CheckpointError(_no_place(target, str(error.strerror))) from None
    return target


def _assemble_into(target: Path, part: TrainedPart | None) -> None:
    # Only to make it are torch and its libraries needed.
    from utils.checkpoint.default.build import build

    # The lock lies beside the folder, which is replaced whole.
    with sole_writer(target, lock=target.parent / f".{target.name}{LOCK_FILE}", wait=True) as held:
        # Another process may have finished it while this one waited.
        if not _is_current(target, part):
            if held:
                remove_leftovers(target.parent, target.name)
            if (free := shutil.disk_usage(target.parent).free) < _ROOM_BYTES:
                raise CheckpointError(_no_place(target, f"{free / 1e6:.0f} MB are free there"))
            logger.info("assembling the default checkpoint in %s (once, about half a minute)", target)
            with atomic_folder(target) as folder, writing(target):
                build(folder, part)
                write_json(folder / STAMP_FILE, {"recipe": recipe_fingerprint(part), "files": _sizes(folder)})


def _no_place(target: Path, reason: str) -> str:
    return (
        f"the default checkpoint cannot be assembled ({reason}): name a folder with {_ROOM_BYTES / 1e6:.0f} MB of room "
        f"in $CODE_LLAVA_CHECKPOINTS, or another checkpoint; this was tried: {target}"
    )


def _sizes(folder: Path) -> dict[str, int]:
    """Weights and settings of an assembled folder → bytes."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.name != STAMP_FILE}


def _is_current(folder: Path, part: TrainedPart | None) -> bool:
    """Whether the folder is there, whole and of this recipe; what cannot be told is made anew."""
    stamp = folder / STAMP_FILE
    if not stamp.exists():
        return False
    try:
        values = read_settings(stamp)
        files = values.get("files")
        if values.get("recipe") != recipe_fingerprint(part) or not isinstance(files, dict):
            return False
        there = _sizes(folder)
        if lost := [name for name, size in files.items() if there.get(name) != size]:
            raise CheckpointError(f"{folder / lost[0]} is missing or of another size")
    except (CodeLlavaError, OSError) as error:
        logger.warning("%s: the default checkpoint is assembled again", error)
        return False
    return True
