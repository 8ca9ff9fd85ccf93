"""The token caches of a run: examples made where they are missing, tokenised where the cache is not current."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, DatasetError
from utils.files import read_json, read_jsonl
from utils.locks import remove_leftovers, sole_writer
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.processor import Processor
from utils.training.config import DataConfig, TrainConfig
from utils.training.data.build import REPORT_FILE, build_examples
from utils.training.data.cache import TokenCache
from utils.training.data.chat import replayed_answers
from utils.training.data.excerpts import SizeRange

logger = logging.getLogger(__name__)

_RECIPE_KEYS = ("source", "seed", "max_files", "package_weights", "question_first")


def open_caches(
    config: TrainConfig, model: CodeLLaVAModel, processor: Processor, *, wait: bool = False
) -> dict[str, TokenCache]:
    """Task → examples of a run, built and tokenised on first use.

    Args:
        config: The run.
        model: The pair before its training, whose answers the task chat keeps.
        processor: Its tokenizers.
        wait: Wait for another process that makes data in the folder; by default that is an error.

    Raises:
        DatasetError: The data are malformed or damaged.
        ConfigError: A stage's mixture names a task that is not there, the folder was built by another recipe, or
            another process makes data in it.
    """
    folder = Path(config.data.folder)
    if config.data.tasks:
        _build_missing(folder, config.data, model, processor, wait)
    caches = tokenize_folder(folder, processor, wait=wait)
    if not caches:
        raise ConfigError(f"{folder} has no JSONL files: name data.tasks to build some, or put your own there")
    for number, stage in enumerate(config.stages):
        for task in stage.mixture:
            if task not in caches:
                raise ConfigError(f"stages[{number}].mixture: no task {task}; the data have {', '.join(caches)}")
    return caches


def tokenize_folder(folder: Path, processor: Processor, *, wait: bool = False) -> dict[str, TokenCache]:
    """Open the cache beside each JSONL file of a folder, made anew where it is not current.

    Args:
        folder: Where the files are.
        processor: Tokenizers.
        wait: Wait for another process that makes data in the folder; by default that is an error.
    """
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        if not path.is_file():  # a pipe would be waited for
            raise DatasetError(f"{path} is no file: remove it, or give it another name")
    if all(_is_current(path, processor) for path in paths):
        return {path.stem: TokenCache.open(_cache_of(path)) for path in paths}
    with sole_writer(folder, wait=wait) as held:
        if held:
            remove_leftovers(folder, "*.tokens")
        for path in paths:
            # Another process may have made some while this one waited.
            if not _is_current(path, processor):
                TokenCache.build(_cache_of(path), path, read_jsonl(path), processor)
    return {path.stem: TokenCache.open(_cache_of(path)) for path in paths}


def _cache_of(path: Path) -> Path:
    return path.with_suffix(".tokens")


def _is_current(path: Path, processor: Processor) -> bool:
    return TokenCache.is_current(_cache_of(path), path, processor)


def _build_missing(folder: Path, data: DataConfig, model: CodeLLaVAModel, processor: Processor, wait: bool) -> None:
    drawn = {key: getattr(data, key) for key in _RECIPE_KEYS}
    recipe = drawn | {"tasks": data.tasks, "memory_tokens": list(data.memory_tokens)}
    if _is_built(folder, recipe):
        return
    with sole_writer(folder, wait=wait):
        # Another process may have built them while this one waited.
        if _is_built(folder, recipe):
            return
        logger.info("building the training examples in %s (once)", folder)
        shortest, longest = data.memory_tokens
        size = SizeRange(shortest=shortest, longest=longest, chars_per_token=data.chars_per_token)
        answers = replayed_answers(data.tasks, data.seed, model, processor)
        build_examples(folder, data.tasks, size=size, answers=answers, **drawn)


def _is_built(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a folder has a report of its examples, which must be of this recipe."""
    path = folder / REPORT_FILE
    if not path.exists():
        return False
    anew = f"delete {path} to build the examples again"
    try:
        report = read_json(path)
        made = {"package_weights": {}} | {key: report[key] for key in recipe if key in report}  # older have no weights
        made["tasks"] = {task: entry["examples"] for task, entry in report["tasks"].items()}
    except DatasetError as error:
        raise DatasetError(f"{error}: {anew}") from None
    except (TypeError, KeyError, AttributeError):
        raise DatasetError(f"{path} is damaged (it is no report of examples): {anew}") from None
    for key, value in recipe.items():
        if made.get(key) != value:
            raise ConfigError(
                f"{folder} was built with {key} = {made.get(key)}, the configuration says {value}: choose another "
                "data.folder, or delete this one to build it again"
            )
    return True
