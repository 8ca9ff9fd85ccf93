"""What trainers leave behind, read as names and tensors: DeepSpeed ZeRO, FSDP, `.bin` and safetensors files.

    found = find_state("runs/pair/checkpoint_3")     # StateFiles(format="fsdp", path=…/pytorch_model_fsdp_0)
    tensors = read_state(found)                       # raw name → whole tensor on the CPU

Nothing is unpickled but tensors and the few plain classes that describe where they lie. Names are the trainer's own;
`utils.checkpoint.convert.names` brings them home.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.checkpoint.layout import newest_child
from utils.checkpoint.weight_files import weight_files
from utils.errors import CheckpointError, first_line
from utils.pretrained import read_settings

logger = logging.getLogger(__name__)

DEEPSPEED, FSDP, SAFETENSORS, BIN = FORMATS = ("deepspeed", "fsdp", "safetensors", "bin")
_BIN_SUFFIXES = (".bin", ".pt", ".pth")
_BIN_NAMES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model_fsdp.bin")
# Under which trainers put the model in a file with more than the model.
_MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict")
_OPTIMIZER_NAMES = ("optimizer.", "optim.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFiles:
    """A state on disk.

    Attributes:
        format: One of `FORMATS`.
        path: The folder or file that holds it.
    """

    format: str
    path: Path


def find_state(path: str | Path, wanted: str = "auto") -> StateFiles:
    """Find the state in a file, a trainer's folder, or the newest `checkpoint_<int>` of a run.

    Args:
        path: A file, or a folder.
        wanted: One of `FORMATS`, or "auto" for whichever is there.

    Raises:
        CheckpointError: Nothing there, nothing of the wanted format, or several formats side by side.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a trainer's checkpoint folder or its weight file")
    found = list(_candidates(path))
    if not found and path.is_dir() and (newest := newest_child(path)) is not None:
        logger.info("using the newest checkpoint of %s: %s", path, newest.name)
        return find_state(newest, wanted)
    chosen = [state for state in found if wanted in ("auto", state.format)]
    if not chosen:
        expected = ", ".join(FORMATS) if wanted == "auto" else wanted
        there = f"only {' and '.join(state.format for state in found)}" if found else "nothing"
        raise CheckpointError(f"{path}: no model state found: expected {expected}, got {there}")
    if len(chosen) > 1:
        names = " and ".join(state.format for state in chosen)
        raise CheckpointError(f"{path} holds states of several formats ({names}): choose one with --format")
    return chosen[0]


def read_state(found: StateFiles) -> dict[str, torch.Tensor]:
    """Read a state whole, on the CPU, in the dtypes it is stored in (ZeRO: its float32 master weights).

    Raises:
        CheckpointError: A file is missing or damaged, or holds anything but tensors.
    """
    readers = {DEEPSPEED: _read_deepspeed, FSDP: _read_fsdp, SAFETENSORS: _read_safetensors, BIN: _read_bin}
    state = readers[found.format](found.path)
    if not state:
        raise CheckpointError(f"{found.path} holds no tensors")
    return state


def _candidates(path: Path) -> Iterator[StateFiles]:
    if path.is_file():
        if path.suffix == ".safetensors":
            yield StateFiles(format=SAFETENSORS, path=path)
        elif path.suffix in _BIN_SUFFIXES:
            yield StateFiles(format=BIN, path=path)
        return
    tag = path / "latest"
    if any(path.glob("*_optim_states.pt")):
        yield StateFiles(format=DEEPSPEED, path=path)
    elif tag.is_file():
        yield StateFiles(format=DEEPSPEED, path=path / tag.read_text(encoding="utf-8").strip())
    for folder in (path, path / "pytorch_model_fsdp_0"):
        if (folder / ".metadata").is_file():
            yield StateFiles(format=FSDP, path=folder)
    if any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        yield StateFiles(format=SAFETENSORS, path=path)
    for name in _BIN_NAMES:
        if (path / name).is_file():
            yield StateFiles(format=BIN, path=path / name)
            break


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(set(weight_files(path).values())) if path.is_dir() else [path]
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): the file is damaged or half copied") from None


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".json":
        return _tensors_of(_load(path), path)
    state: dict[str, torch.Tensor] = {}
    weight_map = read_settings(path).get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map: expected tensor name → a file beside the index")
    for name in sorted(set(weight_map.values())):
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names {name}, which is not there: the checkpoint is half copied")
        state |= _tensors_of(_load(path.parent / name), path.parent / name)
    lacking = sorted(set(weight_map) - set(state))
    if lacking:
        raise CheckpointError(f"{path} promises {lacking[0]}, which is in none of its files")
    return state


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # A damaged pickle can fail in any way.
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({first_line(error)}): it is damaged, or holds Python objects, "
            "which are never loaded; save the model's state_dict alone"
        ) from None


def _tensors_of(value: Any, path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in what a file holds, whatever stands beside them."""
    while isinstance(value, Mapping) and (inner := [key for key in _MODEL_KEYS if isinstance(value.get(key), Mapping)]):
        value = value[inner[0]]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: expected a state_dict, got {type(value).__name__}")
    strange = [key for key, item in value.items() if not isinstance(item, torch.Tensor)]
    if strange:
        raise CheckpointError(f"{path}: expected a state_dict, but {strange[0]} is no tensor")
    return dict(value)


def _read_deepspeed(folder: Path) -> dict[str, torch.Tensor]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing, which the file `latest` beside it names")
    # Its log and its progress go to stdout, which belongs to our result.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError:
            raise CheckpointError(
                f"{folder} is a DeepSpeed checkpoint, which only the package deepspeed can read, and it is not "
                "installed: `uv pip install deepspeed`; or run DeepSpeed's zero_to_fp32.py, which lies beside it, "
                "where it was trained, and convert what that writes"
            ) from None
        try:
            with _tensors_only():
                state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{folder} is no whole ZeRO checkpoint: {first_line(error)}; copy all its files again"
            ) from None
    return dict(state)


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Make DeepSpeed's own `torch.load` calls refuse everything but tensors and DeepSpeed's plain settings."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _read_fsdp(folder: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    from utils.checkpoint.convert.safe_metadata import MetadataError, SafeReader

    try:
        reader = SafeReader(folder)
        entries = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_OPTIMIZER_NAMES)
        }
        with warnings.catch_warnings():
            # That one process reads what several wrote is what is wanted here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load(state, storage_reader=reader, no_dist=True)
    except MetadataError as error:
        raise CheckpointError(f"{folder / '.metadata'}: {error}") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise CheckpointError(
            f"{folder} is no whole torch.distributed checkpoint ({first_line(error)}): copy all its files again"
        ) from None
    return state
