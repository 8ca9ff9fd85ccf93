"""Where datasets and predictions lie.

data/<length>/<task>/validation.jsonl      or one length alone: data/<task>/validation.jsonl
runs/<length>/<task>.jsonl + manifest.json or one length alone: runs/<task>.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruler.dataset import rows_path
from ruler.registry import TASKS
from utils.errors import DatasetError
from utils.files import read_json, write_json

MANIFEST_NAME = "manifest.json"


def length_folders(root: str | Path, wanted: Sequence[int] | None = None) -> list[Path]:
    """The sub-folders named by a length, shortest first; the folder itself where there are none.

    Args:
        root: Of datasets or predictions.
        wanted: Which lengths; None takes all there are.

    Raises:
        DatasetError: The folder, or a wanted length in it, does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder")
    found = {int(path.name): path for path in root.iterdir() if path.is_dir() and path.name.isdecimal()}
    missing = [length for length in wanted or () if length not in found]
    if missing:
        raise DatasetError(f"{root} has no length {missing[0]}; it has {', '.join(map(str, sorted(found))) or 'none'}")
    return [found[length] for length in sorted(wanted or found)] or [root]


def dataset_tasks(folder: Path, subset: str) -> list[str]:
    """Names of the tasks that one length's folder holds, in the registry's order."""
    return [name for name in TASKS if rows_path(folder / name, subset).is_file()]


def prediction_tasks(folder: Path) -> list[str]:
    """Names of the tasks that a prediction folder holds, in the registry's order."""
    return [name for name in TASKS if (folder / f"{name}.jsonl").is_file()]


def read_run_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prediction folder; {} where there is none (the reference writes none)."""
    path = folder / MANIFEST_NAME
    manifest = read_json(path) if path.is_file() else {}
    if not isinstance(manifest, dict):
        raise DatasetError(f"{path}: expected a JSON object, got {type(manifest).__name__}")
    return manifest


def claim_run_folder(folder: Path, settings: dict[str, Any], subset: str) -> dict[str, Any]:
    """Open a prediction folder for one kind of run.

    Args:
        folder: Made if it is not there.
        settings: What the answers depend on.
        subset: The dataset's subset.

    Returns:
        The manifest so far.

    Raises:
        DatasetError: The folder holds predictions made with other settings (the first difference is named), or a
            dataset.
    """
    manifest = read_run_manifest(folder)
    if "rows_sha256" in manifest:
        raise DatasetError(
            f"{folder} holds a dataset, whose {MANIFEST_NAME} would be lost: choose another output folder"
        )
    wanted = {**settings, "subset": subset}
    check_same(manifest.get("settings", wanted), wanted, folder)
    if not manifest and prediction_tasks(folder):
        raise DatasetError(f"{folder} holds predictions without {MANIFEST_NAME}: choose another output folder")
    return {"settings": wanted, "data": {}, **manifest}


def check_same(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise `DatasetError` at the first setting in which a folder's predictions differ from this run."""
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise DatasetError(
                f"{folder} holds predictions made with {key} = {stored.get(key)!r}, this run has {wanted.get(key)!r}: "
                "choose another output folder, or remove this one"
            )


def write_run_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Store the manifest of a prediction folder."""
    write_json(folder / MANIFEST_NAME, manifest)


def choose(available: Sequence[str], wanted: Sequence[str] | None, folder: Path) -> list[str]:
    """The wanted tasks, or all there are.

    Raises:
        DatasetError: A wanted task is not there, or there is none at all.
    """
    if not available:
        raise DatasetError(f"{folder} holds no task's rows: prepare the dataset first (python -m ruler prepare)")
    missing = [name for name in wanted or () if name not in available]
    if missing:
        raise DatasetError(f"{folder} has no rows of {', '.join(missing)}; it has {', '.join(available)}")
    return list(wanted) if wanted else list(available)
