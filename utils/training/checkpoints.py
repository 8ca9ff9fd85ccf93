"""A run's checkpoints: everything a resumed run needs to go on as if nothing had happened, whole or not there at all.

    <output>/checkpoints/step_00000120/
        trained.safetensors     every parameter that some stage trains, float32
        optimizer.safetensors   AdamW's state, by parameter name
        progress.json           stage, step, data cursor, counters, the run's settings, checksums of all this

No pickle anywhere. Learning rates are a function of the step and need no state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from utils.files import atomic_folder, read_json, sha256_bytes, sha256_file, write_json
from utils.training.config import UNPACKER, TrainConfig
from utils.training.plain import from_plain
from utils.training.sharding import full, part_of

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STEPS = "step_*"
TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.safetensors", "progress.json"
_RNG = "rng.cpu"
_NAME = re.compile(r"step_(\d{8,})")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
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

    stage: int
    step: int
    global_step: int
    skipped: int
    labels: int
    seconds: float
    packer: dict[str, Any] | None
    # Not in the checkpoints of older runs.
    place: float = 0.0
    started_from: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        numbers = (self.stage, self.step, self.global_step, self.skipped, self.labels, self.seconds, self.place)
        if not all(0 <= number < 1 << 53 for number in numbers):
            raise ConfigError("a number that cannot be")
        if self.step > self.global_step or (self.step > 0 and self.packer is None):
            raise ConfigError("steps and data cursor do not go together")


def save_checkpoint(
    config: TrainConfig,
    progress: Progress,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    *,
    write: bool = True,
) -> Path:
    """Write a checkpoint and drop the oldest ones.

    Sharded parameters are gathered, which every process must take part in.

    Args:
        config: The run's settings, stored with it.
        progress: Where it stands; `global_step` names the folder.
        trained: Name → parameter.
        optimizer: The current stage's; None between stages.
        write: False on processes that only take part in the gathering.

    Raises:
        CheckpointError: The disk is full or not writable; earlier checkpoints are as they were.
    """
    root = Path(config.output) / FOLDER
    target = root / f"step_{progress.global_step:08d}"
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
            values = {**dataclasses.asdict(progress), "config": config.what_is_trained()}
            values["files"] = {name: sha256_file(folder / name) for name in (TRAINED, OPTIMIZER)}
            write_json(folder / PROGRESS, {**values, "sha256": _digest(values)})
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
            progress = _read_progress(folder, config)
            if not _shapes(folder / TRAINED):
                raise CheckpointError(f"{folder / TRAINED} is damaged: it has no tensor")
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


def _read_progress(folder: Path, config: TrainConfig) -> Progress:
    path = folder / PROGRESS
    try:
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise CheckpointError(f"{path} is damaged (it has no settings)")
        # Checkpoints of older runs have no checksums.
        if (known := values.pop("sha256", None)) is not None and known != _digest(values):
            raise CheckpointError(f"{path} is damaged (its checksum is another)")
        files = dict(values.pop("files", {}))
        saved, now = _flat(values.pop("config")), _flat(config.what_is_trained())
        progress: Progress = from_plain(Progress, values)
    except (ConfigError, OSError, RecursionError, DatasetError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read ({error})") from None
    named = _NAME.fullmatch(folder.name)
    if named is None or int(named[1]) != progress.global_step or progress.stage > len(config.stages):
        raise CheckpointError(f"{path} is damaged (its stage and steps cannot be this checkpoint's)")
    for key in sorted(saved | now):
        if saved.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was written with {key} = {saved.get(key)!r}, the configuration says {now.get(key)!r}: go "
                "back to the old value, or choose another output folder for a new run"
            )
    for name, known in files.items():
        with _explained(folder / name):
            if sha256_file(folder / name) != known:
                raise CheckpointError(f"{folder / name} is damaged (its checksum is another)")
    return progress


def _digest(values: dict[str, Any]) -> str:
    """Hex sha256 of JSON values, the same before they are written and after."""
    return sha256_bytes(json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode())


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
    _compare(folder / TRAINED, _shapes(folder / TRAINED), wanted)
    path = folder / OPTIMIZER
    found = _shapes(path)
    try:
        with _explained(path), safe_open(path, framework="pt") as file:
            torch.Generator().set_state(file.get_tensor(_RNG))
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
    del found[_RNG]
    learnt = {key.rpartition("|")[0] for key in found}
    if not learnt <= wanted.keys() or bool(learnt) != within_stage:
        raise CheckpointError(f"{path} is damaged: the state of other parameters, or of none")
    _compare(
        path,
        found,
        {f"{name}|{field}": [] if field == "step" else wanted[name] for name in learnt for field in _MOMENTS},
    )


def _compare(path: Path, found: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            raise CheckpointError(f"{path}: {name} is missing or unknown: damaged, or the pair is another one")
        if found[name] != wanted[name]:
            raise CheckpointError(f"{path}: {name} has the shape {found[name]}, expected {wanted[name]}")


def restore(
    folder: Path, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors, which `check_fits` has seen, into the parameters, or into the optimiser if given."""
    if optimizer is None:
        state = _load(folder / TRAINED)
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


def _load(path: Path) -> dict[str, torch.Tensor]:
    with _explained(path):
        return load_file(path)


def _shapes(path: Path) -> dict[str, list[int]]:
    """Name → shape of a file's tensors, from its header; the library compares its length with them."""
    with _explained(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping


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
