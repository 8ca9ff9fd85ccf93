"""A run's checkpoints: everything a resumed run needs to go on as if nothing had happened, whole or not there at all.

    <output>/checkpoints/step_00000120/
        trained.safetensors     every parameter that some stage trains, float32
        optimizer.safetensors   AdamW's state, by parameter name
        progress.json           stage, step, data cursor, counters, the run's settings

No pickle anywhere. Learning rates are a function of the step and need no state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.errors import CheckpointError, ConfigError, DatasetError, first_line
from utils.files import atomic_folder, read_json, write_json
from utils.training.config import UNPACKER, TrainConfig
from utils.training.sharding import full, part_of

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STEPS = "step_*"
TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.safetensors", "progress.json"
_RNG = "rng.cpu"
_NAME = re.compile(r"step_(\d{8,})")
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
# Not in the checkpoints of older runs.
_LATER_FIELDS = {"place", "started_from"}
_LARGEST = 1 << 53


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
    # Later ones than this are damaged: the run went on from before them.
    for old in [folder for folder in _all(config.output) if folder <= target][: -config.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of most steps, or None."""
    return max((folder for folder in _all(output) if (folder / PROGRESS).is_file()), default=None)


def whole_checkpoint(
    config: TrainConfig, check: Callable[[Path, Progress], None] | None = None
) -> tuple[Path, Progress] | None:
    """The newest checkpoint that is whole, and where it stands; newer ones that are damaged are named in a warning.

    Args:
        config: The run.
        check: Raises a CheckpointError for a checkpoint that does not fit what is to go on from it.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ConfigError: It was written under other settings; the message names the first that differs.
        CheckpointError: There are checkpoints, but none is whole.
    """
    damaged = []
    for folder in reversed(_all(config.output)):
        try:
            progress = read_progress(folder, config)
            _check_trained(folder)
            if check is not None:
                check(folder, progress)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            logger.warning("%s: going on from %s, which is whole", message, folder.name)
        return folder, progress
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}, and no older checkpoint is whole: delete {Path(config.output) / FOLDER} to begin anew"
        )
    return None


def read_progress(folder: Path, config: TrainConfig) -> Progress:
    """Where a checkpoint stands.

    Raises:
        ConfigError: It was written under other settings; the message names the first that differs.
        CheckpointError: Its file is missing or damaged.
    """
    path = folder / PROGRESS
    try:
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise CheckpointError(f"{path} is damaged (it has no settings)")
        saved, now = _flat(values.pop("config")), _flat(config.what_is_trained())
        _check_values(path, values, len(config.stages))
    except DatasetError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    for key in sorted(saved | now):
        if saved.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was written with {key} = {saved.get(key)!r}, the configuration says {now.get(key)!r}: go "
                "back to the old value, or choose another output folder for a new run"
            )
    return Progress(**values)


def _check_values(path: Path, values: Mapping[str, Any], num_stages: int) -> None:
    types = {field.name: field.type for field in dataclasses.fields(Progress)}
    if not types.keys() - _LATER_FIELDS <= values.keys() <= types.keys():
        differing = sorted(values.keys() ^ types.keys())[0]
        raise CheckpointError(f"{path} is damaged ({differing} is missing or unknown)")
    for name, value in values.items():
        if types[name] == "int":
            good = type(value) is int and 0 <= value < _LARGEST
        elif types[name] == "float":
            good = type(value) in (int, float) and 0 <= value < _LARGEST
        else:
            good = value is None or isinstance(value, dict)
        if not good:
            raise CheckpointError(f"{path} is damaged ({name} has a value that it cannot have)")
    named = _NAME.fullmatch(path.parent.name)
    if named is None or int(named[1]) != values["global_step"] or not values["stage"] <= num_stages:
        raise CheckpointError(f"{path} is damaged (its stage and steps cannot be this checkpoint's)")
    if values["step"] > values["global_step"] or (values["step"] > 0 and values["packer"] is None):
        raise CheckpointError(f"{path} is damaged (its steps and data cursor do not go together)")


def load_trained(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a checkpoint that belong to the pair: without the unpacker's.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return {name: t for name, t in _load(folder / TRAINED).items() if not name.startswith(f"{UNPACKER}.")}


def check_fits(folder: Path, trained: Mapping[str, torch.nn.Parameter], within_stage: bool) -> None:
    """See that a checkpoint's tensors are those of these parameters, without reading them.

    Args:
        folder: The checkpoint.
        trained: Name → parameter.
        within_stage: It has an optimiser's state.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape, or a file is damaged.
    """
    wanted = {name: list(parameter.shape) for name, parameter in trained.items()}
    path = folder / TRAINED
    _compare(path, {name: shape for name, (shape, _) in _shapes(path).items()}, wanted)
    path = folder / OPTIMIZER
    found = _shapes(path)
    rng = torch.get_rng_state()
    if found.pop(_RNG, None) != (list(rng.shape), "U8"):
        raise CheckpointError(f"{path} is damaged: the state of the random generator is missing or another")
    try:
        torch.Generator().set_state(_load(path, _RNG)[_RNG])
    except RuntimeError as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
    learnt = {key.rpartition("|")[0] for key in found}
    if not learnt <= wanted.keys() or bool(learnt) != within_stage:
        raise CheckpointError(f"{path} is damaged: the state of other parameters, or of none")
    moments = {
        f"{name}|{field}": [] if field == "step" else wanted[name] for name in learnt for field in sorted(_MOMENTS)
    }
    _compare(path, {name: shape for name, (shape, _) in found.items()}, moments)


def _compare(path: Path, found: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            raise CheckpointError(f"{path}: {name} is missing or unknown: damaged, or the pair is another one")
        if found[name] != wanted[name]:
            raise CheckpointError(f"{path}: {name} has the shape {found[name]}, expected {wanted[name]}")


def _check_trained(folder: Path) -> None:
    if not _shapes(folder / TRAINED):
        raise CheckpointError(f"{folder / TRAINED} is damaged: it has no tensor")


def restore(
    folder: Path, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors into the parameters, and into the optimiser if one is given.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape.
    """
    if optimizer is None:
        state = _load(folder / TRAINED)
        _compare(
            folder / TRAINED,
            {name: list(t.shape) for name, t in state.items()},
            {name: list(p.shape) for name, p in trained.items()},
        )
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
    return sorted(path for path in root.glob(STEPS) if _NAME.fullmatch(path.name) and path.is_dir())


def _load(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Tensors of a file; all of them where none is named."""
    with _explained(path):
        if not names:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}


def _shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Name → shape and dtype of a file's tensors, from its header; the library compares its length with them."""
    with _explained(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        if not path.is_file():
            raise FileNotFoundError("no file")
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None


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
