"""A dataset folder: `<folder>/<subset>.jsonl` with the rows and `<folder>/manifest.json` with where they come from.

The manifest is the dataset's identity: what wrote it (mode, seed, task, length, tokenizer, data) and a fingerprint of
the rows. Predictions name the fingerprint, so that they are never scored against other rows.

    manifest, rows = read_dataset("data/4096/niah_single_2")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import DatasetError
from utils.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

_REQUIRED_FIELDS = {"index": int, "input": str, "outputs": list, "length": int, "answer_prefix": str}


def rows_path(folder: str | Path, subset: str = "validation") -> Path:
    """Path of the rows of a dataset folder."""
    return Path(folder) / f"{subset}.jsonl"


def manifest_path(folder: str | Path, subset: str = "validation") -> Path:
    """Path of the manifest; subsets other than the usual one have their own beside it."""
    return Path(folder) / (MANIFEST_NAME if subset == "validation" else f"manifest.{subset}.json")


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
    write_json(manifest_path(folder, subset), complete)
    return complete


def read_manifest(folder: str | Path, subset: str = "validation") -> dict[str, Any] | None:
    """The manifest of a dataset folder, or None where there is none yet.

    Raises:
        DatasetError: The file is not a manifest.
    """
    path = manifest_path(folder, subset)
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DatasetError(f"{path} is not a dataset manifest of format {MANIFEST_FORMAT}: prepare the dataset again")
    return manifest


def read_dataset(folder: str | Path, subset: str = "validation") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read and check a dataset folder.

    Args:
        folder: The folder of one task at one length, e.g. `data/4096/vt`.
        subset: Stem of the rows file.

    Returns:
        The manifest ({} for a folder written by the reference program, which has none) and the rows.

    Raises:
        DatasetError: The rows are missing or incomplete, changed since the manifest was written, or lack a field.
    """
    path = rows_path(folder, subset)
    if not path.exists():
        raise DatasetError(f"{path} does not exist: prepare the dataset first (python -m ruler prepare)")
    manifest = read_manifest(folder, subset) or {}
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
