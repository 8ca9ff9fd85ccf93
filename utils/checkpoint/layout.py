"""A checkpoint's folder: its two published layouts, whether it is whole, and its fingerprint.

    files = open_checkpoint("pairs/mine")
    files.config                                     # CompressionConfig

Two published layouts, one model:

    Code-LLaVA   llm/      embedder/  projectors/{code_projection,code_norm_pre}.safetensors  (model_config.json: ours)
    LCLM         decoder/  encoder/   adapter/adapter.safetensors                             model_config.json

Nothing larger than a header is opened, except for the fingerprint.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from utils.checkpoint.lora import base_of, base_or_self, is_peft_folder
from utils.checkpoint.weight_files import tensor_names, weight_files
from utils.errors import CheckpointError, ConfigError
from utils.files import sha256_bytes, sha256_file
from utils.model.config import CONFIG_FILE, CompressionConfig
from utils.pretrained import ADAPTER_CONFIG, CONFIG, TOKENIZER_CONFIG, read_config, read_settings

logger = logging.getLogger(__name__)

_RUN_CHILD = re.compile(r"checkpoint_(\d+)(?:\D.*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where one published layout keeps its parts.

    Attributes:
        name: Its name in messages.
        decoder: Folder of the decoder.
        encoder: Folder of the encoder.
        adapter: File(s) of the adapter → prefix map from the names on disk to ours.
        token_columns: The same for what token columns add; empty where that stands in a file of the adapter.
    """

    name: str
    decoder: str
    encoder: str
    adapter: Mapping[str, Mapping[str, str]]
    token_columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def adapter_files(self, config: CompressionConfig) -> dict[str, Mapping[str, str]]:
        """The adapter's files under a configuration, as `adapter`."""
        return {**self.adapter, **(self.token_columns if config.token_columns else {})}

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
    token_columns={
        "projectors/code_tokens.safetensors": {"norm.weight": "token_norm.weight", "weight": "token_fc.weight"}
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
    def decoder_tensors(self) -> dict[str, Path]:
        """Tensor name → file of the decoder, of its base for a LoRA folder."""
        return weight_files(base_or_self(self.decoder))

    @cached_property
    def decoder_config(self) -> Any:
        """The decoder's Hugging Face configuration, its base's for a LoRA folder.

        Raises:
            CheckpointError: It cannot be used.
        """
        folder = base_or_self(self.decoder)
        config = read_config(folder)
        for name in ("hidden_size", "vocab_size"):
            check_size(config, name, folder)
        return config

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over everything that decides a latent: encoder, adapter and compression (not the chunk size)."""
        parts = [(f"{self.layout.encoder}/{path.name}", path) for path in _model_files(self.encoder)]
        parts += [(name, self.root / name) for name in self.layout.adapter_files(self.config)]
        if is_peft_folder(self.encoder):
            parts += [(f"base/{path.name}", path) for path in _model_files(base_of(self.encoder))]
        settings = {key: value for key, value in self.config.to_json().items() if key != "compression_ratio"}
        if self.config.window_follows:
            del settings["encoder_window_size"]
        lines = [f"{name} {_sha256(path)}" for name, path in parts]
        return sha256_bytes("\n".join([*lines, json.dumps(settings, sort_keys=True)]).encode())


def open_checkpoint(folder: str | Path, chunk_size: int | None = None) -> CheckpointFiles:
    """Open a checkpoint's folder and check that it is whole.

    Args:
        folder: The checkpoint itself.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.

    Raises:
        CheckpointError: Something is missing in it.
        ConfigError: The checkpoint cannot serve this chunk size, or does not say its own and none was given.
    """
    root = Path(folder)
    layout = _layout_of(root)
    files = CheckpointFiles(root=root, layout=layout, config=_read_config(root, layout, chunk_size))
    _check_complete(files)
    return files


def newest_child(root: Path) -> Path:
    """The `checkpoint_<int>…` of the largest number in a run's folder; a checkpoint itself, or a file, as it is."""
    if not root.is_dir() or any((root / layout.decoder).is_dir() for layout in LAYOUTS):
        return root
    numbered = [(int(m.group(1)), p) for p in root.iterdir() if p.is_dir() and (m := _RUN_CHILD.fullmatch(p.name))]
    if not numbered:
        return root
    newest = max(numbered)[1]
    logger.info("using the newest checkpoint of %s: %s", root, newest.name)
    return newest


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
    for name in files.layout.adapter_files(files.config):
        tensor_names(files.root / name)
    for folder in (files.decoder, files.encoder):
        config = ADAPTER_CONFIG if is_peft_folder(folder) else CONFIG
        for name in (config, TOKENIZER_CONFIG):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing: the checkpoint is half copied; copy it again")
    _ = files.decoder_tensors
    if not is_peft_folder(files.encoder):
        weight_files(files.encoder)


def check_size(config: Any, name: str, folder: Path) -> None:
    """Refuse a configuration in which a size is no positive whole number.

    Raises:
        CheckpointError: Names the file and the key.
    """
    value = getattr(config, name, None)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder / CONFIG}: {name}: expected a whole number of at least 1, got {value!r}")


def _model_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer."""
    suffixes = (".safetensors", ".json", ".model", ".bin")
    return sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.is_file())


def _sha256(path: Path) -> str:
    state = path.stat()
    return _sha256_once(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _sha256_once(path: Path, size_bytes: int, changed_ns: int) -> str:
    """Once a process for each state of a file."""
    return sha256_file(path)
