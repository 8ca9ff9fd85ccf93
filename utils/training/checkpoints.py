"""A run's checkpoints: everything a resumed run needs to go on as if nothing had happened, whole or not there at all.

    <output>/checkpoints/step_00000120/
        trained.safetensors     every parameter that some stage trains, float32
        optimizer.safetensors   AdamW's state, by parameter name
        progress.json           stage, step, data cursor, counters, the run's settings

No pickle anywhere. Learning rates are a function of the step and need no state.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_folder, read_json, write_json
from utils.training.config import UNPACKER, TrainConfig
from utils.training.sharding import full, part_of

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.safetensors", "progress.json"
_RNG = "rng.cpu"


@dataclass
class Progress:
    """Where a run stands; stored in checkpoints as JSON.

    Attributes:
        stage: Index of the stage.
        step: Steps done in it.
        place: How far its schedule has come, in steps; ahead of `step` where a time budget drove it.
        global_step: Steps done in all.
        skipped: Steps left out because loss or gradient was not finite.
        labels: Tokens that a loss was taken on.
        seconds: Time spent in steps.
        packer: Data cursor of the stage; None at its beginning.
        started_from: The trained part that the run began with: its fingerprint, run and configuration.
    """

    stage: int = 0
    step: int = 0
    place: float = 0.0
    global_step: int = 0
    skipped: int = 0
    labels: int = 0
    seconds: float = 0.0
    packer: dict[str, Any] | None = None
    started_from: dict[str, Any] | None = None


def save_checkpoint(
    config: TrainConfig,
    progress: Mapping[str, Any],
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    *,
    write: bool = True,
) -> Path:
    """Write a checkpoint and drop the oldest ones.

    Sharded parameters are gathered, which every process must take part in.

    Args:
        config: The run's settings, stored with it.
        progress: JSON values; `global_step` names the folder.
        trained: Name → parameter.
        optimizer: The current stage's; None between stages.
        write: False on processes that only take part in the gathering.

    Raises:
        CheckpointError: The disk is full or not writable; earlier checkpoints are as they were.
    """
    root = Path(config.output) / FOLDER
    target = root / f"step_{progress['global_step']:08d}"
    names = {id(parameter): name for name, parameter in trained.items()}
    states = [(names[id(parameter)], state) for parameter, state in (optimizer.state if optimizer else {}).items()]
    tensors = _gather(trained.items(), write)
    moments = _gather(((f"{name}|{key}", value) for name, state in states for key, value in state.items()), write)
    if not write:
        return target
    try:
        with atomic_folder(target) as folder:
            save_file(tensors, folder / TRAINED)
            save_file({_RNG: torch.get_rng_state(), **moments}, folder / OPTIMIZER)
            write_json(folder / PROGRESS, {**progress, "config": config.what_is_trained()})
    except (OSError, SafetensorError) as error:
        kept = newest_checkpoint(config.output)
        raise CheckpointError(
            f"{target} could not be written ({error}); the last whole checkpoint is {kept.name if kept else 'none'}: "
            "make room on the disk and run the same command again"
        ) from error
    for old in _all(config.output)[: -config.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of most steps, or None."""
    return max(_all(output), default=None)


def read_progress(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Where a checkpoint stands.

    Raises:
        ConfigError: It was written under other settings; the message names the first that differs.
    """
    progress = read_json(folder / PROGRESS)
    saved, now = _flat(progress.pop("config")), _flat(config.what_is_trained())
    for key in sorted(saved | now):
        if saved.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was written with {key} = {saved.get(key)!r}, the configuration says {now.get(key)!r}: go "
                "back to the old value, or choose another output folder for a new run"
            )
    return progress


def load_trained(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a checkpoint that belong to the pair: without the unpacker's.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return {name: t for name, t in _load(folder / TRAINED).items() if not name.startswith(f"{UNPACKER}.")}


def restore(
    folder: Path, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors into the parameters, and into the optimiser if one is given.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape.
    """
    if optimizer is None:
        state = _load(folder / TRAINED)
        if set(state) != set(trained):
            differing = sorted(set(state) ^ set(trained))[0]
            raise CheckpointError(f"{folder / TRAINED}: {differing} is missing or unknown: the pair is another one")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(part_of(state[name], parameter))
        return
    moments = _load(folder / OPTIMIZER)
    torch.set_rng_state(moments.pop(_RNG))
    for key, value in moments.items():
        name, _, field = key.rpartition("|")
        parameter = trained[name]
        # The count of steps is a number, whole on every process; the fused kernel wants it beside its parameter.
        whole = field == "step"
        optimizer.state[parameter][field] = value.to(parameter.device) if whole else part_of(value, parameter)


def _all(output: str | Path) -> list[Path]:
    root = Path(output) / FOLDER
    return sorted(path for path in root.glob("step_*") if (path / PROGRESS).is_file())


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): delete this checkpoint to go on from an older one"
        ) from None


def _gather(named: Iterable[tuple[str, Any]], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, by name; nothing on a process that does not keep them."""
    gathered = {}
    for name, value in named:
        whole = full(torch.as_tensor(value).detach())
        if keep:
            gathered[name] = whole.cpu().contiguous()
    return gathered


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}
