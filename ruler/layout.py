"""Folders of datasets and of predictions: where files lie, and what their manifests vouch for.

data/<length>/<task>/validation.jsonl      or one length alone: data/<task>/validation.jsonl
runs/<length>/<task>.jsonl + manifest.json or one length alone: runs/<task>.jsonl

A dataset's manifest is its identity: what wrote it (mode, seed, task, length, tokenizer, data) and a fingerprint of
the rows. Predictions name the fingerprint, so that they are never scored against other rows.

    manifest, rows = read_dataset("data/4096/niah_single_2")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruler.registry import TASKS
from utils.errors import DatasetError
from utils.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_REQUIRED_FIELDS = {"index": int, "input": str, "outputs": list, "length": int, "answer_prefix": str}


def rows_path(folder: str | Path, subset: str = "validation") -> Path:
    """Path of the rows of a dataset folder."""
    return Path(folder) / f"{subset}.jsonl"


def _manifest_path(folder: str | Path, subset: str) -> Path:
    """Subsets other than the usual one have a manifest of their own."""
    return Path(folder) / (MANIFEST if subset == "validation" else f"manifest.{subset}.json")


def write_dataset(
    folder: str | Path, rows: list[dict[str, Any]], manifest: dict[str, Any], subset: str = "validation"
) -> dict[str, Any]:
    """Write rows, then the manifest that vouches for them; returns the manifest as written.

    A reader that finds the manifest finds all its rows: a kill between the two leaves rows without a manifest, or with
    the manifest of other rows, which `read_dataset` refuses.
    """
    path = rows_path(folder, subset)
    write_jsonl(path, rows)
    complete = {"format": MANIFEST_FORMAT, **manifest, "num_rows": len(rows), "rows_sha256": sha256_file(path)}
    write_json(_manifest_path(folder, subset), complete)
    return complete


def read_manifest(folder: str | Path, subset: str = "validation") -> dict[str, Any]:
    """The manifest of a dataset folder; {} where there is none, as in a folder of the reference program.

    Raises:
        DatasetError: The file is not a manifest.
    """
    path = _manifest_path(folder, subset)
    manifest = read_json(path) if path.exists() else None
    if manifest is not None and (not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT):
        raise DatasetError(f"{path} is not a dataset manifest of format {MANIFEST_FORMAT}: prepare the dataset again")
    return manifest or {}


def read_dataset(folder: str | Path, subset: str = "validation") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read and check a dataset folder.

    Args:
        folder: The folder of one task at one length, e.g. `data/4096/vt`.
        subset: Stem of the rows file.

    Returns:
        The manifest, as of `read_manifest`, and the rows.

    Raises:
        DatasetError: The rows are missing or incomplete, changed since the manifest was written, or lack a field.
    """
    path = rows_path(folder, subset)
    if not path.exists():
        raise DatasetError(f"{path} does not exist: prepare the dataset first (python -m ruler prepare)")
    manifest = read_manifest(folder, subset)
    if manifest and (got := sha256_file(path)) != manifest["rows_sha256"]:
        raise DatasetError(
            f"{path} is not the file its manifest describes: expected sha256 {manifest['rows_sha256'][:16]}…, "
            f"got {got[:16]}…; prepare the dataset again"
        )
    rows = list(read_jsonl(path))
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}, row {number}")
    return manifest, rows


def _check_row(row: dict[str, Any], where: str) -> None:
    for name, kind in _REQUIRED_FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise DatasetError(f"{where}: field {name!r} must be {kind.__name__}, got {row.get(name)!r:.60}")
    if not row["outputs"]:
        raise DatasetError(f"{where}: field 'outputs' is empty, so there is nothing to score against")


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


def dataset_tasks(folder: Path, subset: str, wanted: Sequence[str] | None = None) -> list[str]:
    """The tasks that one length's folder holds, in the registry's order, or the wanted ones of them.

    Raises:
        DatasetError: A wanted task is not there, or there is none at all.
    """
    available = [name for name in TASKS if rows_path(folder / name, subset).is_file()]
    if not available:
        raise DatasetError(f"{folder} holds no task's rows: prepare the dataset first (python -m ruler prepare)")
    if missing := [name for name in wanted or () if name not in available]:
        raise DatasetError(f"{folder} has no rows of {', '.join(missing)}; it has {', '.join(available)}")
    return list(wanted or available)


def prediction_tasks(folder: Path) -> list[str]:
    """Names of the tasks that a prediction folder holds, in the registry's order."""
    return [name for name in TASKS if (folder / f"{name}.jsonl").is_file()]


def read_run_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prediction folder; {} where there is none (the reference writes none)."""
    path = folder / MANIFEST
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
        raise DatasetError(f"{folder} holds a dataset, whose {MANIFEST} would be lost: choose another output folder")
    wanted = {**settings, "subset": subset}
    check_same(manifest.get("settings", wanted), wanted, folder)
    if not manifest and prediction_tasks(folder):
        raise DatasetError(f"{folder} holds predictions without {MANIFEST}: choose another output folder")
    return {"settings": wanted, "data": {}, **manifest}


def check_same(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise `DatasetError` at the first setting in which a folder's predictions differ from this run."""
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise DatasetError(
                f"{folder} holds predictions made with {key} = {stored.get(key)!r}, this run has {wanted.get(key)!r}: "
                "choose another output folder, or remove this one"
            )
