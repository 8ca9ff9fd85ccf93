"""Puts task, template, tokenizer and data together: a `Recipe` is everything that decides a dataset's rows.

rows = list(generate_rows(Recipe(task="vt", max_seq_length=4096, tokenizer="models/Qwen3-4B", num_samples=20)))
"""

from __future__ import annotations

import argparse
import collections
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from ruler.generation.counting import PieceCounter
from ruler.generation.data_files import RulerData
from ruler.generation.essay import Essay
from ruler.generation.fitting import CountMismatchError, RowMaker, balanced_row, compat_rows, derive_seed
from ruler.generation.tasks.base import NotFullError, Prompt, Streams, TaskGenerator, TooShortError
from ruler.generation.tasks.code import CodeTask
from ruler.generation.tasks.common_words import CommonWords
from ruler.generation.tasks.freq_words import FreqWords
from ruler.generation.tasks.humaneval import SolutionHaystack
from ruler.generation.tasks.niah import Niah
from ruler.generation.tasks.qa import QuestionAnswering
from ruler.generation.tasks.repoqa import NeedleFunction
from ruler.generation.tasks.variable_tracking import VariableTracking
from ruler.generation.templates import chat_template
from ruler.generation.tokenizers import TOKENIZER_TYPES, load_tokenizer
from ruler.registry import BALANCED_FAMILIES, get_task
from utils.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

MODES = ("compat", "balanced")
_MAX_LENGTHS = 100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the rows of one dataset.

    Attributes:
        task: Name of the task.
        max_seq_length: Budget in tokens: prompt, answer prefix and room for the answer.
        tokenizer: Path, hub id or encoding name.
        tokenizer_type: `hf`, `openai` or `nemo`.
        num_samples: Number of rows.
        seed: Random seed.
        mode: `compat` or `balanced` (see `ruler/generation/fitting.py`). Code tasks are always balanced.
        template: Chat template: a name of `ruler.generation.templates.NAMED`, or `tokenizer`.
        remove_newline_tab: Flatten prompts to one line.
        reference_index: NIAH's `index` as in the reference: a character offset.
        first: Number of the first sample, for a chunk of a dataset.
        data_dir: Folder of the data files; None = built in.
        code_dir: Folder of source files for the code tasks; None = installed packages.
    """

    task: str
    max_seq_length: int
    tokenizer: str
    tokenizer_type: str = "hf"
    num_samples: int = 500
    seed: int = 42
    mode: str = "compat"
    template: str = "base"
    remove_newline_tab: bool = False
    reference_index: bool = False
    first: int = 0
    data_dir: str | None = None
    code_dir: str | None = None

    @property
    def balanced(self) -> bool:
        """Whether every row has streams of its own."""
        return self.mode == "balanced" or get_task(self.task).family in BALANCED_FAMILIES

    def check(self) -> None:
        """Raises:
        ConfigError: A value is out of its range.
        """
        get_task(self.task)
        if self.mode not in MODES:
            raise ConfigError(f"unknown mode {self.mode!r}: expected one of {', '.join(MODES)}")
        for name, least in (("max_seq_length", 1), ("num_samples", 1), ("first", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be {least} or more, got {getattr(self, name)}")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that decide rows, whichever command makes them."""
    group = parser.add_argument_group("samples")
    group.add_argument("--tokenizer-path", "--tokenizer_path", dest="tokenizer", required=True,
                       help="folder, tokenizer.json or hub id; tiktoken encoding; sentencepiece model")  # fmt: skip
    group.add_argument("--tokenizer-type", "--tokenizer_type", default="hf", choices=TOKENIZER_TYPES,
                       help="Hugging Face, tiktoken or sentencepiece (default: hf)")  # fmt: skip
    group.add_argument("--num-samples", "--num_samples", type=int, default=500, help="rows a dataset (default: 500)")
    group.add_argument("--seed", "--random-seed", "--random_seed", type=int, default=42, help="seed (default: 42)")
    group.add_argument("--template", "--model-template-type", "--model_template_type", default="base",
                       help="chat template: base, meta-chat, …, or tokenizer for its own (default: base)")  # fmt: skip
    group.add_argument("--remove-newline-tab", "--remove_newline_tab", action="store_true",
                       help="make each prompt one line")  # fmt: skip
    group.add_argument("--mode", choices=MODES, default="compat", help="compat: the reference's rows, "
                       "byte for byte; balanced: every row full, depths even (default: compat)")  # fmt: skip
    group.add_argument("--reference-index", action="store_true",
                       help="compat: NIAH's index as the reference writes it, a character offset")  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", "--data_dir", help="folder of the real data files (default: built-in data)")
    data.add_argument("--code-dir", "--code_dir", help="source files for the code tasks (default: installed packages)")


def recipe_from(args: argparse.Namespace, task: str, max_seq_length: int, **changes: Any) -> Recipe:
    """The recipe that the flags of `add_recipe_arguments` describe, but for `changes`."""
    names = (
        "tokenizer tokenizer_type num_samples seed mode template remove_newline_tab reference_index data_dir code_dir"
    )
    values = {name: getattr(args, name) for name in names.split()}
    return Recipe(task=task, max_seq_length=max_seq_length, **{**values, **changes})


# What the rows of one process share.
_tokenizer = lru_cache(maxsize=2)(load_tokenizer)
_data = lru_cache(maxsize=2)(RulerData)


@lru_cache(maxsize=2)
def _counter(kind: str, path: str, whole: bool) -> PieceCounter:
    return PieceCounter(_tokenizer(kind, path), whole=whole)


@lru_cache(maxsize=2)
def _essay(folder: str | None, kind: str, path: str, whole: bool) -> Essay:
    return Essay(_data(folder, None).essay_words, _counter(kind, path, whole))


def generate_rows(
    recipe: Recipe, start: int = 0, stop: int | None = None, *, whole: bool = False
) -> Iterator[dict[str, Any]]:
    """Make the rows of a dataset.

    Args:
        recipe: What to make.
        start: First row to yield. A balanced dataset can start anywhere; the others draw what comes before.
        stop: End of the rows (exclusive); all without it.
        whole: Count every text in one go: slow, and done anyway where the counts of parts do not add up.

    Raises:
        ConfigError: A value of the recipe is wrong.
        DatasetError: Data is missing, or no sample fits the budget.
    """
    recipe.check()
    stop = recipe.num_samples if stop is None else stop
    try:
        yield from _rows(recipe, _row_maker(recipe, whole), start, stop)
    except CountMismatchError as mismatch:
        # Found on the first row made, before it was yielded.
        logger.warning("%s: counting whole texts, parts do not add up (%s)", recipe.tokenizer, mismatch)
        yield from _rows(recipe, _row_maker(recipe, whole=True), start, stop)


def with_enough_length(recipe: Recipe, error: TooShortError) -> TooShortError:
    """The same error with a length at which all rows of the recipe were seen to fit.

    Each length draws other samples, and the row that failed need not be the longest: the rows are made, at growing
    lengths.

    Args:
        recipe: What was asked for.
        error: Why it cannot be had.
    """
    enough = recipe.max_seq_length
    for _ in range(_MAX_LENGTHS):
        # A little more than what was missing: other rows miss a little more.
        enough = max(error.needed or enough + 1, enough) + enough // 100
        try:
            collections.deque(generate_rows(replace(recipe, max_seq_length=enough)), maxlen=0)
        except TooShortError as longer:
            error = TooShortError(error.fact, longer.needed)
        except NotFullError:
            error = TooShortError(error.fact, enough + 1)
        except DatasetError:
            # Something else is wrong, which more room does not mend.
            return error
        else:
            return TooShortError(error.fact, enough, recipe.num_samples)
    return error


def _rows(recipe: Recipe, maker: RowMaker, start: int, stop: int) -> Iterator[dict[str, Any]]:
    if recipe.balanced:
        shared = Streams(derive_seed(recipe.seed, recipe.task, recipe.max_seq_length, "shared"))
        maker.generator.begin(shared, maker.counter)
        for number in range(start, stop):
            yield balanced_row(maker, recipe.seed, number + recipe.first)
        return
    for number, row in enumerate(compat_rows(maker, recipe.seed, stop, recipe.first)):
        if number >= start:
            yield row


def _row_maker(recipe: Recipe, whole: bool) -> RowMaker:
    counter = _counter(recipe.tokenizer_type, recipe.tokenizer, whole)
    return RowMaker(_generator(recipe, whole), counter, recipe.reference_index)


def _generator(recipe: Recipe, whole: bool) -> TaskGenerator:
    task = get_task(recipe.task)
    data = _data(recipe.data_dir, recipe.code_dir)
    prompt = Prompt(task, chat_template(recipe.template, recipe.tokenizer))
    common = (task, prompt, recipe.max_seq_length, recipe.remove_newline_tab)
    match task.family:
        case "niah":
            in_essay, of_words = task.params["haystack"] == "essay", task.params["key"] == "words"
            source = (recipe.data_dir, recipe.tokenizer_type, recipe.tokenizer, whole)
            return Niah(
                *common, essay=_essay(*source) if in_essay else None, pairs=data.word_lists.pairs if of_words else None
            )
        case "variable_tracking":
            return VariableTracking(*common)
        case "common_words":
            words = data.word_lists.shuffled(recipe.seed)
            return CommonWords(*common, words=words, more_words=lambda: data.english_words)
        case "freq_words":
            return FreqWords(*common)
        case "qa":
            return QuestionAnswering(*common, source=data.questions(task.params["dataset"]))
        case "code":
            return CodeTask(*common, files=data.code_files("python"))
        case "repoqa":
            return NeedleFunction(*common, pool=data.functions(task.params["language"]))
        case "humaneval":
            problems = data.problems.functions
            return SolutionHaystack(*common, pool=data.functions("python"), problems=problems)
    raise AssertionError(f"no generator for the family {task.family}")


def describe(recipe: Recipe) -> dict[str, Any]:
    """What identifies the rows of a recipe: its values, and fingerprints of tokenizer and data.

    Raises:
        ConfigError: A value of the recipe is wrong, or the tokenizer cannot be loaded.
        DatasetError: Data is missing.
    """
    recipe.check()
    task = get_task(recipe.task)
    tokenizer = _tokenizer(recipe.tokenizer_type, recipe.tokenizer)
    data = _data(recipe.data_dir, recipe.code_dir)
    chat = chat_template(recipe.template, recipe.tokenizer)
    return {
        "task": task.name,
        "max_seq_length": recipe.max_seq_length,
        "tokens_to_generate": task.tokens_to_generate,
        "num_samples": recipe.num_samples,
        "first_sample": recipe.first,
        "mode": "balanced" if recipe.balanced else "compat",
        "seed": recipe.seed,
        "template": {"name": chat.name, "before": chat.before, "behind": chat.behind},
        "remove_newline_tab": recipe.remove_newline_tab,
        "reference_index": recipe.reference_index,
        # The name without its folder: a dataset says nothing about the machine it was made on.
        "tokenizer": {
            "type": recipe.tokenizer_type,
            "name": PurePath(tokenizer.name).name,
            "sha256": tokenizer.fingerprint,
        },
        "data": data.sources(task),
    }
