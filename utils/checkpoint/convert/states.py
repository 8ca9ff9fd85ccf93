"""What trainers leave behind, read as names and tensors: DeepSpeed ZeRO, FSDP, `.bin` and safetensors files.

    found = find_state("runs/pair/checkpoint_3")     # StateFiles(format="fsdp", path=…/pytorch_model_fsdp_0)
    tensors = read_state(found)                       # raw name → whole tensor on the CPU

Nothing is unpickled but tensors and the few plain classes that describe where they lie. Names are the trainer's own;
`utils.checkpoint.convert.names` brings them home.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from utils.checkpoint.convert.safe_metadata import SafeReader
from utils.checkpoint.layout import newest_child
from utils.checkpoint.weight_files import read_index, weight_files
from utils.errors import CheckpointError
from utils.pretrained import loading

DEEPSPEED, FSDP, SAFETENSORS, BIN = FORMATS = ("deepspeed", "fsdp", "safetensors", "bin")
_SUFFIXES = {".safetensors": SAFETENSORS, **dict.fromkeys((".bin", ".pt", ".pth"), BIN)}
# Which files show that a folder holds a state; the first that is there counts.
_SIGNS = {
    DEEPSPEED: ("*_optim_states.pt", "latest"),
    FSDP: (".metadata", "pytorch_model_fsdp_0/.metadata"),
    SAFETENSORS: ("model.safetensors", "model.safetensors.index.json"),
    BIN: ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model_fsdp.bin"),
}
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
    found = _states_in(path)
    if not found and (newest := newest_child(path)) != path:
        return find_state(newest, wanted)
    chosen = [state for state in found if wanted in ("auto", state.format)]
    names = " and ".join(state.format for state in found)
    if not chosen:
        expected = ", ".join(FORMATS) if wanted == "auto" else wanted
        there = f"only {names}" if found else "nothing"
        raise CheckpointError(f"{path}: no model state found: expected {expected}, got {there}")
    if len(chosen) > 1:
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


def _states_in(path: Path) -> list[StateFiles]:
    """At most one of each format."""
    if path.is_file():
        return [StateFiles(format=_SUFFIXES[path.suffix], path=path)] if path.suffix in _SUFFIXES else []
    found = []
    for kind, patterns in _SIGNS.items():
        sign = next((file for pattern in patterns for file in path.glob(pattern) if file.is_file()), None)
        if sign is not None:
            place = sign if kind == BIN else sign.parent
            if sign.name == "latest":
                place /= sign.read_text(encoding="utf-8").strip()
            found.append(StateFiles(format=kind, path=place))
    return found


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(weight_files(path).values())) if path.is_dir() else [path]:
        with loading(file, "cannot be read, being damaged or half copied"):
            state |= load_file(file)
    return state


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".json":
        return _tensors_in(path)
    state: dict[str, torch.Tensor] = {}
    places = read_index(path)
    for file in sorted(set(places.values())):
        state |= _tensors_in(file)
    if lacking := places.keys() - state.keys():
        raise CheckpointError(f"{path} promises {min(lacking)}, which is in none of its files")
    return state


def _tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a pickled file, whatever stands beside them."""
    with loading(
        path, "is damaged, or holds Python objects, which are never loaded (save the model's state_dict alone)"
    ):
        value: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
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
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
            from deepspeed.runtime.zero.config import ZeroStageEnum
            from deepspeed.utils.tensor_fragment import fragment_address
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError:
            raise CheckpointError(
                f"{folder} is a DeepSpeed checkpoint, which only the package deepspeed can read, and it is not "
                "installed: `uv pip install deepspeed`; or run DeepSpeed's zero_to_fp32.py, which lies beside it, "
                "where it was trained, and convert what that writes"
            ) from None
        # DeepSpeed asks `torch.load` for any object. Torch's own switch makes those calls refuse everything but tensors
        # and DeepSpeed's plain settings.
        with (
            loading(folder, "is no whole ZeRO checkpoint (copy all its files again)"),
            patch_environment(torch_force_weights_only_load=1),
            torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]),
        ):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


def _read_fsdp(folder: Path) -> dict[str, torch.Tensor]:
    with loading(folder, "is no whole torch.distributed checkpoint (copy all its files again)"):
        reader = SafeReader(folder)
        # Tensors only: what else a checkpoint holds, torch would unpickle as it comes.
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_OPTIMIZER_NAMES)
        }
        with warnings.catch_warnings():
            # That one process reads what several wrote is what is wanted here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            try:
                load(state, storage_reader=reader, no_dist=True)
            except CheckpointException as error:
                # What the one process met says more than torch's bundle of tracebacks.
                raise next(iter(error.failures.values()))[0] from None
    return state
