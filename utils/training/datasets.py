"""The token caches of a run: examples made where they are missing, tokenised where the cache is not current."""

from __future__ import annotations

import logging
from pathlib import Path

from utils.errors import ConfigError
from utils.files import read_json, read_jsonl
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.processor import Processor
from utils.training.config import DataConfig, TrainConfig
from utils.training.data.build import REPORT_FILE, build_examples
from utils.training.data.cache import TokenCache
from utils.training.data.chat import replayed_answers
from utils.training.data.excerpts import SizeRange

logger = logging.getLogger(__name__)

_RECIPE_KEYS = ("source", "seed", "max_files", "package_weights", "question_first")


def open_caches(config: TrainConfig, model: CodeLLaVAModel, processor: Processor) -> dict[str, TokenCache]:
    """Task → examples of a run, built and tokenised on first use.

    Args:
        config: The run.
        model: The pair before its training, whose answers the task chat keeps.
        processor: Its tokenizers.

    Raises:
        DatasetError: The data are malformed.
        ConfigError: A stage's mixture names a task that is not there, or the folder was built by another recipe.
    """
    folder = Path(config.data.folder)
    if config.data.tasks:
        _build_missing(folder, config.data, model, processor)
    caches = tokenize_folder(folder, processor)
    if not caches:
        raise ConfigError(f"{folder} has no JSONL files: name data.tasks to build some, or put your own there")
    for number, stage in enumerate(config.stages):
        for task in stage.mixture:
            if task not in caches:
                raise ConfigError(f"stages[{number}].mixture: no task {task}; the data have {', '.join(caches)}")
    return caches


def tokenize_folder(folder: Path, processor: Processor) -> dict[str, TokenCache]:
    """Open the cache beside each JSONL file of a folder, made anew where it is not current."""
    caches = {}
    for path in sorted(folder.glob("*.jsonl")):
        target = path.with_suffix(".tokens")
        current = TokenCache.is_current(target, path, processor)
        caches[path.stem] = (
            TokenCache.open(target) if current else TokenCache.build(target, path, read_jsonl(path), processor)
        )
    return caches


def _build_missing(folder: Path, data: DataConfig, model: CodeLLaVAModel, processor: Processor) -> None:
    report_path = folder / REPORT_FILE
    drawn = {key: getattr(data, key) for key in _RECIPE_KEYS}
    recipe = drawn | {"tasks": data.tasks, "memory_tokens": list(data.memory_tokens)}
    if report_path.is_file():
        report = {"package_weights": {}, **read_json(report_path)}  # older reports have none
        made = {key: report.get(key) for key in (*_RECIPE_KEYS, "memory_tokens")}
        made["tasks"] = {task: entry["examples"] for task, entry in report["tasks"].items()}
        if made == recipe:
            return
        differing = next(key for key in recipe if made[key] != recipe[key])
        raise ConfigError(
            f"{folder} was built with {differing} = {made[differing]}, the configuration says {recipe[differing]}: "
            "choose another data.folder, or delete this one to build it again"
        )
    logger.info("building the training examples in %s (once)", folder)
    shortest, longest = data.memory_tokens
    size = SizeRange(shortest=shortest, longest=longest, chars_per_token=data.chars_per_token)
    answers = replayed_answers(data.tasks, data.seed, model, processor)
    build_examples(folder, data.tasks, size=size, answers=answers, **drawn)
