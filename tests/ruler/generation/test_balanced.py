"""balanced mode: full rows, even depths, the same rows in whatever order they are made."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import cache

import pytest

from ruler.generation.data_files import RulerData
from ruler.generation.fitting import MIN_FILL
from ruler.generation.generate import generate_rows, with_enough_length
from ruler.generation.tasks.base import TooShortError
from ruler.generation.tasks.qa import QuestionSet
from ruler.generation.tokenizers import load_tokenizer
from ruler.registry import RULER_13, get_task
from tests.support.ruler_recipes import recipe, reference_folder
from utils.errors import DatasetError


@pytest.mark.slow
@pytest.mark.parametrize("max_seq_length", [1100, 4096])
@pytest.mark.parametrize("task", RULER_13)
def test_every_row_fills_the_budget(task: str, max_seq_length: int) -> None:
    if task == "qa_2" and max_seq_length < 2000:
        max_seq_length = 3000  # ten documents of its own
    wanted = recipe(task, max_seq_length, mode="balanced", num_samples=6)
    tokenizer = load_tokenizer("hf", wanted.tokenizer)
    for row in generate_rows(wanted):
        tokens = tokenizer.count([row["input"] + row["answer_prefix"]])[0]
        assert row["length"] == tokens + get_task(task).tokens_to_generate
        assert MIN_FILL * max_seq_length <= row["length"] <= max_seq_length


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_1", "vt", "qa_2", "cwe"])
def test_rows_do_not_depend_on_what_was_made_before(task: str) -> None:
    wanted = recipe(task, 3000, mode="balanced", num_samples=3)
    rows = list(generate_rows(wanted))
    assert list(generate_rows(wanted, 2, 3)) == rows[2:]
    assert len({row["input"] for row in rows}) == len(rows)


@pytest.mark.parametrize("task", ["niah_single_1", pytest.param("niah_single_2", marks=pytest.mark.slow), "qa_1"])
def test_depths_are_uniform(task: str) -> None:
    """Kolmogorov-Smirnov distance of 60 depths to the uniform distribution; a random sample stays below 0.21."""
    depths = []
    for row in generate_rows(recipe(task, 2500, mode="balanced", num_samples=60)):
        context = row["input"][row["context_start"] : row["context_end"]]
        answer = row["outputs"][0]
        wanted = f"is: {answer}." if task.startswith("niah") else gold_document(row["input"])
        depths.append(context.index(wanted) / (len(context) - len(wanted)))
    depths.sort()
    distance = max(abs((rank + 0.5) / len(depths) - depth) for rank, depth in enumerate(depths))
    assert distance < 0.12


@cache
def questions() -> QuestionSet:
    return RulerData(reference_folder()).questions("squad")


def gold_document(prompt: str) -> str:
    source = questions()
    question = next(item for item in source.questions if prompt.endswith(f"Question: {item.text}"))
    return source.documents[question.gold[0]]


@pytest.mark.parametrize("mode", ["compat", "balanced"])
@pytest.mark.parametrize("task", [*RULER_13, "code_lookup"])
def test_a_budget_that_is_too_small_is_an_error(task: str, mode: str) -> None:
    with pytest.raises(DatasetError, match=f"{task} does not fit into 140 tokens.*--max-seq-length of"):
        list(generate_rows(recipe(task, 140, mode=mode)))


@pytest.mark.parametrize("mode", ["compat", "balanced"])
@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1"])
def test_the_length_that_the_error_names_fits_all_rows(task: str, mode: str) -> None:
    wanted = recipe(task, 130, num_samples=10, mode=mode)
    with pytest.raises(TooShortError) as caught:
        list(generate_rows(wanted))
    error = pickle.loads(pickle.dumps(with_enough_length(wanted, caught.value)))  # it comes from another process
    named = int(str(error).split("--max-seq-length of ")[1].split(",")[0])
    assert str(error).endswith("which is enough for the 10 rows")
    assert len(list(generate_rows(replace(wanted, max_seq_length=named)))) == 10
