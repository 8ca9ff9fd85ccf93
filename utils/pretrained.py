"""Hugging Face folders, read without trust: the one place that has transformers load something.

    config = read_config("pairs/mine/llm")
    tokenizer = read_tokenizer("pairs/mine/llm")
    model, report = read_model(AutoModel, "pairs/mine/embedder")

A checkpoint is data. Python that it carries is never run, nothing is unpickled, nobody is asked a question, and for a
folder no hub is asked. Whatever is wrong with its files is one `CheckpointError` that names the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, CodeLlavaError, DatasetError, first_line
from utils.files import read_json

logger = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER_CONFIG = "adapter_config.json"
# What transformers and peft read as settings.
_SETTINGS = (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    ADAPTER_CONFIG,
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
)
# Keys that make a loader run or fetch something else than what lies in the folder → what to do about them.
_REFUSED = {
    "auto_map": "its own Python, which is never run: remove the key if transformers knows the architecture",
    "custom_pipelines": "its own Python, which is never run: remove the key",
    "configuration_files": "other configurations in place of this file: remove the key",
    "transformers_weights": "a weight file of its own choice: name the weights model.safetensors and remove the key",
    "fusion_config": "changes to transformers' classes: remove the key",
    "use_pretrained_backbone": "another model, which would be fetched: remove the key",
    "megatron_config": "a module that would be imported: remove the key",
}
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")
_TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
_MAX_JSON_BYTES = 1 << 28
# Lists and modules of these lengths are made before any size is compared with the weights.
_COUNT = re.compile(r"(layers?|experts?|blocks?|depth|num_labels)$")
_MAX_COUNT = 10_000
# Numbers that a model may have beyond what is stored: a pooler, a head that is made anew.
_SPARE_NUMBERS = 1 << 26
_HUB_FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.tiktoken", "*.txt")
# What stands in the place of a large file where a repository was cloned without `git lfs` (git-lfs's spec).
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint that must be one object.

    Raises:
        CheckpointError: It is missing, no plain file, not UTF-8, not JSON, or no object; names the file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or no plain file: the checkpoint is half copied; copy it again")
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, which no such file needs: copy it again")
        value = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except DatasetError as error:
        _refuse_pointers(path)
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_config(name: str | Path) -> Any:
    """Read the configuration of a model.

    Args:
        name: Its folder, or a hub id that the user gave.

    Raises:
        CheckpointError: It cannot be used, or asks for code of its own.
    """
    from transformers import AutoConfig

    folder = fetch(name)
    _check_settings(folder)
    with loading(folder / CONFIG, "cannot be used as a configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_tokenizer(name: str | Path, **options: Any) -> Any:
    """Read a tokenizer.

    Args:
        name: Its folder, or a hub id that the user gave.
        options: Passed on, for example `padding_side`.

    Raises:
        CheckpointError: It cannot be read, or asks for code of its own.
    """
    from transformers import AutoTokenizer

    folder = fetch(name)
    _check_settings(folder)
    with loading(lambda: _tokenizer_culprit(folder), "cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
        # Ids and specials of the wrong kind show only when they are used.
        tokenizer(tokenizer.decode(tokenizer("a b")["input_ids"]))
        return tokenizer


def read_model(
    kind: Any, name: str | Path, *, dtype: Any = "auto", attn_implementation: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load a model's safetensors weights on the CPU.

    Args:
        kind: `transformers.AutoModel` or `AutoModelForCausalLM`.
        name: Its folder, or a hub id that the user gave.
        dtype: A torch dtype; "auto" for the stored one.
        attn_implementation: A name that transformers knows; None for its choice, whatever the configuration says.

    Returns:
        The model, and transformers' report: `missing_keys`, `unexpected_keys`, `mismatched_keys`.

    Raises:
        CheckpointError: It cannot be built or loaded, asks for code of its own, or is stored quantised or pickled.
    """
    import torch
    from transformers.initialization import no_init_weights

    folder = fetch(name)
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{folder / CONFIG}: quantization_config: quantised weights are not loaded; save the model dequantised"
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} stands beside whole weights: remove it, or name their base")
    config._attn_implementation = attn_implementation
    asked = f" with the attention implementation {attn_implementation}" if attn_implementation else ""
    # First its shapes alone: sizes that the weights do not have would be allocated before they are compared.
    with (
        loading(folder / CONFIG, f"describes no model that can be built{asked}"),
        torch.device("meta"),
        no_init_weights(),
    ):
        shapes = kind.from_config(config, trust_remote_code=False)
        numbers = sum(x.numel() for x in (*shapes.parameters(), *shapes.buffers()))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if numbers > stored + _SPARE_NUMBERS:
        raise CheckpointError(
            f"{folder / CONFIG} describes a model of {numbers} numbers, but its weights have only {stored} bytes: "
            "one of them belongs to another model"
        )
    with loading(folder, "cannot be loaded as a model"):
        return kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            generation_config=_generation_config(folder),
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            # Wrong shapes come back in the report, which names them; transformers' own error does not.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )


def fetch(name: str | Path, patterns: Sequence[str] | None = _HUB_FILES) -> Path:
    """The folder of a model: itself, or a snapshot of the hub repository that the user named.

    Args:
        name: A folder, or a hub id.
        patterns: Which files of a repository; None for all.

    Raises:
        CheckpointError: There is no such folder and the hub has no such repository, or cannot be reached.
    """
    # Unlike Path.is_dir, this takes any text.
    if os.path.isdir(name):  # noqa: PTH112
        return Path(name)
    # Late: most folders are local, and the hub's client takes its time to load.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    logger.info("%s is no local folder: downloading it from the Hugging Face hub", name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns) if patterns else None))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a local folder nor could it be downloaded from the hub: {first_line(error)}"
        ) from None


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars, one a folder and often faster than the eye, off stderr."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def loading(where: Any, what: str) -> Iterator[None]:
    """Turn whatever another library raises over a checkpoint's files into a `CheckpointError`.

    Only the library's call belongs inside: an error of our own would be taken for the checkpoint's.

    Args:
        where: The file, or a function that finds it once something is wrong.
        what: What is the matter with it: "cannot be read".
    """
    try:
        yield
    except CodeLlavaError:
        raise
    except BaseException as error:
        # Panics of the libraries in Rust are no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        logger.debug("%s", what, exc_info=True)
        place = where() if callable(where) else where
        _refuse_pointers(place)
        raise CheckpointError(f"{place} {what}: {first_line(error)}") from None


def _refuse_pointers(place: str | Path) -> None:
    """Refuse a file, or any in its folder or this folder, in whose place there is only a pointer of Git LFS."""
    place = Path(place)
    folder = place if place.is_dir() else place.parent
    beside = (path for pattern in _HUB_FILES for path in sorted(folder.glob(pattern)))
    for path in (place, *beside):
        if path.is_file() and path.stat().st_size <= _MAX_POINTER_BYTES and path.read_bytes().startswith(_LFS_POINTER):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in the repository that it was cloned "
                "from, or download the checkpoint from the hub"
            ) from None


def _check_settings(folder: Path) -> None:
    """Refuse settings that are no objects, that have something run or fetched, or whose sizes are absurd."""
    # A template is read by no parser that would complain.
    _refuse_pointers(folder)
    for path in (folder / name for name in _SETTINGS):
        if path.exists():
            with loading(path, "cannot be read"):
                _check_values(read_settings(path), path)


def _check_values(values: Any, path: Path) -> None:
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        if key in _REFUSED and value not in (None, False, {}, []):
            raise CheckpointError(f"{path}: {key} asks for {_REFUSED[key]}")
        if str(key).strip("_").removesuffix("_internal") in _KERNEL_KEYS and "/" in str(value):
            raise CheckpointError(f"{path}: {key} names code on a hub ({value!r}), which is never run: remove the key")
        if isinstance(value, int) and value > _MAX_COUNT and _COUNT.search(str(key)):
            raise CheckpointError(f"{path}: {key}: expected at most {_MAX_COUNT}, got {value:.6g}")
        if isinstance(value, (Mapping, list)):
            _check_values(value, path)


def _tokenizer_culprit(folder: Path) -> Path:
    """Which of a tokenizer's files is to blame."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig

    readers = {
        CONFIG: lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
        TOKENIZER: lambda: Tokenizer.from_file(str(folder / TOKENIZER)),
    }
    for name, read in readers.items():
        try:
            with loading(folder, "is searched"):
                if (folder / name).exists():
                    read()
        except CheckpointError:
            return folder / name
    return folder / TOKENIZER_CONFIG


def _generation_config(folder: Path) -> Any:
    """The settings of a generating model; None where it has none of its own."""
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    if not path.exists():
        return None
    with loading(path, "cannot be used as generation settings"):
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
    # What generating finds out only later, in many ways.
    for key, value in settings.to_dict().items():
        items = value if isinstance(value, list) else [value]
        if key in _TOKEN_IDS and value is not None and any(type(item) is not int for item in items):
            raise CheckpointError(f"{path}: {key}: expected token ids, got {value!r:.100}")
        if key.startswith("output_") and not isinstance(value, bool | None):
            raise CheckpointError(f"{path}: {key}: expected true or false, got {value!r:.100}")
    return settings
