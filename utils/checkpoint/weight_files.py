"""Which safetensors file of a Hugging Face folder holds which tensor; nothing larger than a header is opened."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from utils.errors import CheckpointError
from utils.pretrained import loading, read_settings


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from the safetensors index or the one file of a Hugging Face folder.

    Raises:
        CheckpointError: No safetensors weights, or a shard of the index is missing, damaged or another one.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(tensor_names(single), single)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _shards(index)
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder}: its weights are pickled (pytorch_model*.bin): python -m utils.checkpoint.convert writes the "
            "checkpoint anew with safetensors"
        )
    raise CheckpointError(
        f"{folder}: no model.safetensors or index: write the weights as safetensors (save_pretrained does)"
    )


def _shards(index: Path) -> dict[str, Path]:
    places = read_index(index)
    promised: dict[Path, set[str]] = {}
    for name, shard in places.items():
        if shard.suffix != ".safetensors":
            raise CheckpointError(f"{index}: {name}: expected a .safetensors file, got {shard.name!r:.100}")
        promised.setdefault(shard, set()).add(name)
    for shard, names in promised.items():
        if lacking := names - set(tensor_names(shard)):
            raise CheckpointError(f"{shard}: the index promises {min(lacking)}, which is not in it")
    return places


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name → file, from the index of weights in several files.

    Raises:
        CheckpointError: It is no index, or names a file that is not there or not beside it.
    """
    weight_map = read_settings(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor name → file, got {weight_map!r:.60}")
    for name, shard in weight_map.items():
        # What lies outside of the folder is somebody else's.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {name}: expected a file beside the index, got {shard!r:.100}")
    missing = sorted(shard for shard in set(weight_map.values()) if not os.path.isfile(index.parent / shard))  # noqa: PTH113
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} shards that are not there ({', '.join(missing[:3])}): the checkpoint is "
            "half copied; copy it again"
        )
    return {name: index.parent / shard for name, shard in weight_map.items()}


def tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or no plain file")
    with loading(path, "cannot be read, being damaged or half copied"), safe_open(path, framework="pt") as file:
        return list(file.keys())


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the libraries in Rust raise for a full disk and the like into the `OSError` that it is."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
