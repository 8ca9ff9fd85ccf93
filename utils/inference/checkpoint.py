"""Checkpoint folders: find them, check that they are complete and consistent, write them.

    files = find_checkpoint("runs/pair/")            # newest checkpoint_<int> of a run, or the folder itself
    files = find_checkpoint(None)                    # the embedded default, assembled on first use
    files.config                                     # CompressionConfig

Two published layouts, one model:

    Code-LLaVA   llm/      embedder/  projectors/{code_projection,code_norm_pre}.safetensors  (model_config.json: ours)
    LCLM         decoder/  encoder/   adapter/adapter.safetensors                             model_config.json

Weights are read in `utils.inference.weights`; this module opens nothing larger than a header.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from utils.errors import CheckpointError, ConfigError, first_line
from utils.files import sha256_bytes, sha256_file
from utils.model.config import CONFIG_FILE, CompressionConfig
from utils.pretrained import ADAPTER_CONFIG, CONFIG, TOKENIZER_CONFIG, loading, read_settings

logger = logging.getLogger(__name__)

_RUN_CHILD = re.compile(r"checkpoint_(\d+)(?:\D.*)?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where one published layout keeps its parts.

    Attributes:
        name: Its name in messages.
        decoder: Folder of the decoder.
        encoder: Folder of the encoder.
        adapter: File(s) of the adapter → prefix map from the names on disk to ours.
    """

    name: str
    decoder: str
    encoder: str
    adapter: Mapping[str, Mapping[str, str]]

    @property
    def folders(self) -> tuple[str, ...]:
        """The top-level folders that make a checkpoint of this layout."""
        return (self.decoder, self.encoder, str(Path(next(iter(self.adapter))).parent))


CODE_LLAVA = Layout(
    name="code-llava",
    decoder="llm",
    encoder="embedder",
    adapter={
        "projectors/code_norm_pre.safetensors": {"weight": "norm.weight"},
        "projectors/code_projection.safetensors": {
            "0.weight": "fc1.weight",
            "0.bias": "fc1.bias",
            "2.weight": "fc2.weight",
            "2.bias": "fc2.bias",
        },
    },
)
LCLM = Layout(name="lclm", decoder="decoder", encoder="encoder", adapter={"adapter/adapter.safetensors": {}})
LAYOUTS = (CODE_LLAVA, LCLM)


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """A complete checkpoint folder and how it compresses.

    Attributes:
        root: The folder itself.
        layout: Which of the published layouts it has.
        config: From `model_config.json`, at the chunk size that was asked for.
    """

    root: Path
    layout: Layout
    config: CompressionConfig

    @property
    def decoder(self) -> Path:
        """Folder of the decoder and its tokenizer."""
        return self.root / self.layout.decoder

    @property
    def encoder(self) -> Path:
        """Folder of the encoder and its tokenizer."""
        return self.root / self.layout.encoder

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over everything that decides a latent: encoder, adapter and compression (not the chunk size)."""
        parts = [(f"{self.layout.encoder}/{path.name}", path) for path in _model_files(self.encoder)]
        parts += [(name, self.root / name) for name in self.layout.adapter]
        if is_peft_folder(self.encoder):
            parts += [(f"base/{path.name}", path) for path in _model_files(base_of(self.encoder))]
        settings = {key: value for key, value in self.config.to_json().items() if key != "compression_ratio"}
        if self.config.window_follows:
            del settings["encoder_window_size"]
        lines = [f"{name} {_cached_sha256(path)}" for name, path in parts]
        return sha256_bytes("\n".join([*lines, json.dumps(settings, sort_keys=True)]).encode())


def find_checkpoint(path_or_id: str | Path | None = None, chunk_size: int | None = None) -> CheckpointFiles:
    """Find a checkpoint and check that it is whole.

    Args:
        path_or_id: A checkpoint folder; a run folder whose children are `checkpoint_<int>…` (the largest is taken and
            named in the log); a Hugging Face hub id `org/name`; None for the embedded default.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.

    Raises:
        CheckpointError: Nothing there, or something is missing in it.
        ConfigError: The checkpoint cannot serve this chunk size, or does not say its own and none was given.
    """
    root = _local_folder(path_or_id)
    newest = newest_child(root)
    if newest is not None:
        logger.info("using the newest checkpoint of %s: %s", root, newest.name)
        root = newest
    layout = _layout_of(root)
    files = CheckpointFiles(root=root, layout=layout, config=_read_config(root, layout, chunk_size))
    _check_complete(files)
    return files


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
            f"{folder}: its weights are pickled (pytorch_model*.bin): python -m utils.inference.convert writes the "
            "checkpoint anew with safetensors"
        )
    raise CheckpointError(
        f"{folder}: no model.safetensors or index: write the weights as safetensors (save_pretrained does)"
    )


def _shards(index: Path) -> dict[str, Path]:
    folder, weight_map = index.parent, read_settings(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor name → file, got {weight_map!r:.60}")
    for name, shard in weight_map.items():
        # Also what lies outside of the folder is somebody else's.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name}: expected a .safetensors file beside the index, got {shard!r:.100}")
    promised: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        promised.setdefault(shard, set()).add(name)
    missing = sorted(shard for shard in promised if not os.path.isfile(folder / shard))  # noqa: PTH113
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} shards that are not there ({', '.join(missing[:3])}): the checkpoint is "
            "half copied; copy it again"
        )
    for shard, names in promised.items():
        if lacking := names - set(tensor_names(folder / shard)):
            raise CheckpointError(f"{folder / shard}: the index promises {min(lacking)}, which is not in it")
    return {name: folder / shard for name, shard in weight_map.items()}


def tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or no plain file")
    with loading(path, "cannot be read, being damaged or half copied"), safe_open(path, framework="pt") as file:
        return list(file.keys())


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds LoRA weights on top of a base model."""
    return (folder / ADAPTER_WEIGHTS).is_file()


def base_of(folder: Path) -> Path:
    """Folder of the base model that a LoRA folder stands on; only the user himself may have one fetched.

    Raises:
        CheckpointError: The LoRA folder does not say, or its base is not on this machine.
    """
    path = folder / ADAPTER_CONFIG
    base = read_settings(path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(
            f"{path}: base_model_name_or_path: expected a folder, got {base!r:.60}: the LoRA weights do not say their "
            "base"
        )
    # A relative base is meant from the LoRA folder.
    for place in (folder / base, Path(base)):
        # Unlike Path.is_dir, this takes any text.
        if os.path.isdir(place):  # noqa: PTH112
            if is_peft_folder(place):
                raise CheckpointError(f"{path}: base_model_name_or_path: {place} holds LoRA weights itself")
            return place
    way = "put its folder there"
    if _HUB_ID.fullmatch(base):
        local = f"bases/{base.rpartition('/')[2]}"
        way = f"fetch it (hf download {base} --local-dir {local}) and put that folder's path there"
    raise CheckpointError(
        f"{path}: base_model_name_or_path: {base!r:.200} is no folder on this machine, and nothing is fetched that you "
        f"did not ask for: {way}"
    )


def _local_folder(path_or_id: str | Path | None) -> Path:
    if path_or_id is None:
        from utils.inference.default_checkpoint import assemble_default_checkpoint

        return assemble_default_checkpoint()
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the checkpoint's folder")
    if not _HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"{path} does not exist: give a checkpoint folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logger.info("%s is no local folder: downloading it from the Hugging Face hub", path_or_id)
    try:
        return Path(snapshot_download(str(path_or_id)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path_or_id} is neither a local folder nor could it be downloaded from the hub: {first_line(error)}"
        ) from None


def newest_child(root: Path) -> Path | None:
    """The `checkpoint_<int>…` of the largest number in a run's folder; None in a checkpoint itself."""
    numbered = [(int(m.group(1)), p) for p in root.iterdir() if p.is_dir() and (m := _RUN_CHILD.fullmatch(p.name))]
    if not numbered or any((root / layout.decoder).is_dir() for layout in LAYOUTS):
        return None
    return max(numbered)[1]


def _layout_of(root: Path) -> Layout:
    present = {path.name for path in root.iterdir() if path.is_dir()}
    # The layout of which most folders are there; the complaint below then names what is missing of it.
    best = max(LAYOUTS, key=lambda layout: len(present & set(layout.folders)))
    missing = [name for name in best.folders if name not in present]
    if missing:
        wanted = " or ".join(" ".join(f"{name}/" for name in layout.folders) for layout in LAYOUTS)
        raise CheckpointError(
            f"{root} is not a complete checkpoint: {', '.join(f'{m}/' for m in missing)} is missing (expected {wanted})"
        )
    return best


def _read_config(root: Path, layout: Layout, chunk_size: int | None) -> CompressionConfig:
    path = root / CONFIG_FILE
    if path.is_file():
        return CompressionConfig.from_json(read_settings(path), str(path)).with_chunk_size(chunk_size)
    if layout is LCLM:
        raise CheckpointError(f"{path} is missing: an LCLM checkpoint does not say without it how it compresses")
    if chunk_size is None:
        raise ConfigError(
            f"{root} is a published Code-LLaVA checkpoint, which does not say its chunk size: pass --chunk-size with "
            "the value it was trained for"
        )
    return CompressionConfig.code_llava(chunk_size)


def _check_complete(files: CheckpointFiles) -> None:
    for name in files.layout.adapter:
        tensor_names(files.root / name)
    for folder in (files.decoder, files.encoder):
        config = ADAPTER_CONFIG if is_peft_folder(folder) else CONFIG
        for name in (config, TOKENIZER_CONFIG):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing: the checkpoint is half copied; copy it again")
        if not is_peft_folder(folder):
            weight_files(folder)


def _model_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer."""
    suffixes = (".safetensors", ".json", ".model", ".bin")
    return sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.is_file())


def _cached_sha256(path: Path) -> str:
    """sha256 of a file, remembered beside nothing but its size and time of change for the life of the process."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _HASHES:
        _HASHES[key] = sha256_file(path)
    return _HASHES[key]


_HASHES: dict[tuple[str, int, int], str] = {}


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Compare tensor names and shapes with those of a module.

    Raises:
        CheckpointError: Names file, key, expected and got shape of the first difference, and counts the others.
    """
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name}: expected shape {_shape(expected[name])}, got {_shape(state[name])}"
        for name in expected
        if name in state and _shape(expected[name]) != _shape(state[name])
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{where}: {problems[0]}{more}")


def _shape(tensor: Any) -> list[int]:
    return list(tensor.shape)
