"""The trained part of a pair – adapter, marker rows, encoder and decoder or their LoRA – small enough to carry along.

    part = TrainedPart.open(folder)                    # trained.json and its safetensors files
    unused = merge_trained_state(model, part.tensors(), part.lora_scales, marker_ids)

`utils.training.pack` writes the folder, the default checkpoint's assembly reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import CheckpointError, DatasetError
from utils.files import sha256_bytes, sha256_file
from utils.pretrained import loading, read_settings

if TYPE_CHECKING:
    import torch

MANIFEST = "trained.json"
CARD = "README.md"
# How the names of what an adapter's token columns add begin: a pair without them has no place for these.
TOKEN_COLUMNS = "memory_encoder.adapter.token_"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPart:
    """A folder with a trained part.

    Attributes:
        folder: Where it is.
        manifest: Its `trained.json`: files with their sha256, LoRA scales, chunk sizes, where it came from.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> TrainedPart:
        """Open a folder; its files are compared with the manifest when they are read.

        Raises:
            DatasetError: There is no manifest.
            CheckpointError: It cannot be used.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise DatasetError(f"{folder / MANIFEST} does not exist: give the folder of a trained part")
        manifest = read_settings(folder / MANIFEST)
        _check_manifest(manifest, folder / MANIFEST)
        return cls(folder=folder, manifest=manifest)

    @property
    def lora_scales(self) -> dict[str, float]:
        """Prefix of parameter names → LoRA scale."""
        return dict(self.manifest["lora_scales"])

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk sizes that it was trained for."""
        return tuple(self.manifest["chunk_sizes"])

    @property
    def fingerprint(self) -> str:
        """Changes with any of its files."""
        return sha256_bytes((self.folder / MANIFEST).read_bytes())

    @property
    def history(self) -> dict[str, Any]:
        """What a run that goes on from it remembers: `fingerprint`, `run`, `config`, as JSON values."""
        return {"fingerprint": self.fingerprint, "run": self.manifest["run"], "config": self.manifest["config"]}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by name.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        from safetensors.torch import load_file

        tensors: dict[str, torch.Tensor] = {}
        for name, digest in self.manifest["files"].items():
            path = self.folder / name
            # Unlike Path.is_file, this takes any text.
            if not os.path.isfile(path) or sha256_file(path) != digest:  # noqa: PTH113
                raise CheckpointError(f"{path} is missing or damaged: restore it from the repository")
            with loading(path, "cannot be read"):
                tensors |= load_file(path)
        return tensors


def _check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    files, scales, sizes = (manifest.get(key) for key in ("files", "lora_scales", "chunk_sizes"))
    # A name that leads elsewhere is not a part of the folder.
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{path}: files: expected names of files beside it with their sha256, got {files!r:.100}")
    if not isinstance(scales, dict) or any(type(scale) not in (int, float) for scale in scales.values()):
        raise CheckpointError(f"{path}: lora_scales: expected numbers by prefix, got {scales!r:.100}")
    if not isinstance(sizes, list) or any(type(size) is not int or size < 1 for size in sizes):
        raise CheckpointError(f"{path}: chunk_sizes: expected a list of whole numbers, got {sizes!r:.100}")
    for key in ("run", "config"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{path}: {key}: expected an object, got {manifest.get(key)!r:.100}")
