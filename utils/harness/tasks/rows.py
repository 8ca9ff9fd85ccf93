"""Documents for the tasks `memory_*`: RULER's rows and questions about code, their contexts between memory markers.

lm-eval loads this file by its path, beside the YAML files that name its functions, and calls them with `--metadata`
and `--model_args` in one: what is not a setting of theirs is passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from ruler.answering.protocol import Question, RowRefusedError
from ruler.generation.generate import Recipe, generate_rows, with_enough_length
from ruler.generation.tasks.base import TooShortError
from ruler.layout import length_folders, read_dataset
from ruler.registry import get_task
from ruler.scoring.metrics import postprocess
from ruler.scoring.score import answer_values
from utils.checkpoint.locate import find_checkpoint
from utils.errors import ConfigError, DatasetError
from utils.training.config import DataConfig
from utils.training.data.build import HELD_OUT, draw_examples, read_sources
from utils.training.evaluate.scores import contains, is_exact

Documents = dict[str, datasets.Dataset]

_DEFAULT_LENGTH = 4096
_LOOKUP = "lookup"


class ByCategory(ConfigurableTask):
    """A task of a YAML file that is also scored by category: its documents have one, and its scores are named by it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Make the task; lm-eval's own class does not know the key that chose this one."""
        super().__init__(config={name: value for name, value in config.items() if name != "class"})
        for category in sorted(set(self.eval_docs["category"])):
            self._aggregation_list[category] = mean
            self._higher_is_better[category] = True


def ruler(
    task: str,
    ruler_data: str | None = None,
    max_seq_lengths: Sequence[int] | int | None = None,
    num_samples: int = 100,
    tokenizer: str | None = None,
    checkpoint: str | None = None,
    seed: int = 42,
    **_: Any,
) -> Documents:
    """Rows of one RULER task; the category is the length.

    Args:
        task: A name of `ruler.registry.TASKS`.
        ruler_data: Folder that `python -m ruler prepare` wrote; without it rows are generated, full at every length.
        max_seq_lengths: Budgets in tokens, the answer included; None for all of the folder, or 4096.
        num_samples: Rows of each length that is generated.
        tokenizer: Folder or file of the tokenizer that measures generated rows; None for the checkpoint's decoder's.
        checkpoint: As the model takes it.
        seed: Of generated rows.

    Raises:
        DatasetError: The folder lacks a length or the task, or a row does not fit its length.
        ConfigError: A setting cannot be.
    """
    lengths = [max_seq_lengths] if isinstance(max_seq_lengths, int) else max_seq_lengths
    rows: dict[str, list[dict[str, Any]]] = {}
    if ruler_data is not None:
        for folder in length_folders(ruler_data, lengths):
            manifest, found = read_dataset(folder / task)
            rows[str(manifest.get("max_seq_length", folder.name))] = found
    else:
        measured_by = str(tokenizer or find_checkpoint(checkpoint).decoder)
        for length in lengths or [_DEFAULT_LENGTH]:
            recipe = Recipe(
                task=task, max_seq_length=length, tokenizer=measured_by, num_samples=num_samples, seed=seed,
                mode="balanced",
            )  # fmt: skip
            try:
                rows[str(length)] = list(generate_rows(recipe))
            except TooShortError as error:
                raise with_enough_length(recipe, error) from None
    return documents(
        {
            "prompt": _marked(row, f"{task} @ {length}, row {number}"),
            "answer_prefix": row["answer_prefix"],
            "answers": row["outputs"],
            "category": length,
            "task": task,
            # What the answer must not resemble more; of the tasks that ask for a function's code.
            "distractors": row.get("others", {}).get("distractors", []),
        }
        for length, rows_of_length in rows.items()
        for number, row in enumerate(rows_of_length, start=1)
    )


def score_ruler(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """RULER's own score of an answer, overall and by length."""
    task = get_task(document["task"])
    value, _ = answer_values(postprocess(answers[0]), document["answers"], task, document)
    return {"score": value, document["category"]: value}


def lookup(
    num_samples: int = 100,
    memory_tokens: Sequence[int] = (64, 256),
    seed: int = 0,
    question_first: float = 0.0,
    **_: Any,
) -> Documents:
    """Questions about modules of the standard library that are held out of training; the category is their kind.

    Args:
        num_samples: How many.
        memory_tokens: Shortest and longest memory, in tokens (roughly: 3.2 characters each).
        seed: Of the draws.
        question_first: Part of the prompts in which the question stands before the memory.

    Raises:
        ConfigError: A setting cannot be.
        DatasetError: The modules give too few different questions.
    """
    if num_samples < 1 or len(memory_tokens) != 2:
        raise ConfigError(
            f"expected num_samples from 1 up and memory_tokens=[shortest, longest], got {num_samples} and "
            f"{list(memory_tokens)}"
        )
    data = DataConfig(
        folder="",
        tasks={_LOOKUP: num_samples},
        memory_tokens=(memory_tokens[0], memory_tokens[1]),
        source=HELD_OUT,
        question_first=question_first,
        seed=seed,
    )
    examples = itertools.islice(draw_examples(_LOOKUP, read_sources(data), data), num_samples)
    return documents(
        {"prompt": example.messages()[0]["content"], "answer": example.answer, "category": example.kind or _LOOKUP}
        for example in examples
    )


def score_lookup(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether an answer is exact, and whether it contains what was wanted; by kind the latter."""
    found = float(contains(answers[0], document["answer"]))
    return {"exact": float(is_exact(answers[0], document["answer"])), "contains": found, document["category"]: found}


def documents(rows: Iterable[dict[str, Any]]) -> Documents:
    """Rows as lm-eval wants them."""
    return {"test": datasets.Dataset.from_list(list(rows))}


def _marked(row: Mapping[str, Any], where: str) -> str:
    """A row's prompt with its context between the memory markers, up to the answer's prefix.

    Raises:
        DatasetError: The row does not say where its context is, or the prompt holds marker text.
    """
    places: dict[str, Any] = {name: row.get(name) for name in ("context_start", "context_end")}
    if not all(isinstance(place, int) for place in places.values()):
        raise DatasetError(f"{where}: {places} do not say where the context is: make it with python -m ruler prepare")
    try:
        return Question(input=row["input"], answer_prefix="", max_tokens=0, **places).memory_text
    except RowRefusedError as error:
        raise DatasetError(f"{where}: {error}") from None
