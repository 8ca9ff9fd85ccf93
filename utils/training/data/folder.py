"""A folder of examples and their token caches: made where they are missing, tokenised where that is not current."""

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
from utils.training.data.build import REPORT_FILE, build_examples, recipe_of
from utils.training.data.cache import TokenCache
from utils.training.data.chat import replayed_answers

logger = logging.getLogger(__name__)

# Settings that reports did not always name.
_OLDER: dict[str, Any] = {"package_weights": {}, "lengths": "up_to", "scattered": 0.0}


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
    """Open the cache beside each JSONL file of a folder, made anew where it is not current; `wait` as above."""
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        if not path.is_file():  # a pipe would be waited for
            raise DatasetError(f"{path} is no file: remove it, or give it another name")
    caches = {path: path.with_suffix(".tokens") for path in paths}
    if not all(TokenCache.is_current(cache, path, processor) for path, cache in caches.items()):
        with sole_writer(folder, wait=wait) as held:
            if held:
                remove_leftovers(folder, "*.tokens")
            for path, cache in caches.items():
                # Another process may have made some while this one waited.
                if not TokenCache.is_current(cache, path, processor):
                    TokenCache.build(cache, path, read_jsonl(path), processor)
    return {path.stem: TokenCache.open(cache) for path, cache in caches.items()}


def _build_missing(folder: Path, data: DataConfig, model: CodeLLaVAModel, processor: Processor, wait: bool) -> None:
    recipe = recipe_of(data) | {"tasks": data.tasks}
    if _is_built(folder, recipe):
        return
    with sole_writer(folder, wait=wait):
        # Another process may have built them while this one waited.
        if not _is_built(folder, recipe):
            logger.info("building the training examples in %s (once)", folder)
            build_examples(data, replayed_answers(data, model, processor))


def _is_built(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a folder has a report of its examples, which must be of this recipe."""
    path = folder / REPORT_FILE
    if not path.exists():
        return False
    anew = f"delete {path} to build the examples again"
    try:
        report = read_json(path)
        made = _OLDER | {key: report[key] for key in recipe if key in report}
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
