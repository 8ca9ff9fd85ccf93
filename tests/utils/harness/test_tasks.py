"""The tasks `memory_*` as lm-eval loads and runs them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import yaml
from lm_eval.tasks import TaskManager

from ruler.generation.generate import Recipe, generate_rows
from ruler.layout import write_dataset
from ruler.registry import TASKS as RULER_TASKS
from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl
from utils.harness.__main__ import TASKS
from utils.harness.tasks import rows
from utils.model.markers import MEMORY_END, MEMORY_START, split_spans

# Full of whole sentences: the tiny tokenizer has a token a byte.
LENGTH = 1010
Run = Callable[..., dict[str, Any]]


def without_markers(text: str) -> str:
    return text.replace(MEMORY_START, "").replace(MEMORY_END, "")


@pytest.fixture
def recipe(checkpoints: dict[str, Path]) -> Recipe:
    tokenizer = str(checkpoints["lclm"] / "decoder")
    return Recipe(task="niah_single_1", max_seq_length=LENGTH, tokenizer=tokenizer, num_samples=2, mode="balanced")


def test_every_task_of_ruler_has_its_file() -> None:
    found = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert set(found.all_subtasks) == {
        *(f"memory_{name}" for name in RULER_TASKS),
        "memory_lookup",
        "memory_lclm_eval",
    }
    assert set(found.all_tags) == {"memory_ruler", "memory_code", "memory_code_extra"}
    for name, task in RULER_TASKS.items():
        text = (TASKS / f"memory_{name}.yaml").read_text()
        settings = yaml.safe_load(text)
        assert settings["dataset_kwargs"] == {"task": name}
        assert settings["generation_kwargs"]["max_gen_toks"] == task.tokens_to_generate


def test_rows_are_rulers_with_the_context_as_memory(run_tasks: Run, recipe: Recipe) -> None:
    metadata = {"max_seq_lengths": [LENGTH], "num_samples": 2}
    results = run_tasks("memory_niah_single_1", metadata=metadata, chunk_size=16)
    expected = list(generate_rows(recipe))
    samples = results["samples"]["memory_niah_single_1"]
    assert [without_markers(sample["arguments"][0][0]) for sample in samples] == [
        row["input"] + row["answer_prefix"] for row in expected
    ]
    for sample, row in zip(samples, expected, strict=True):
        memories = [piece.text for piece in split_spans(sample["arguments"][0][0], "it") if piece.is_memory]
        assert memories == [row["input"][row["context_start"] : row["context_end"]]]
        assert row["outputs"][0] in memories[0]
    scores = results["results"]["memory_niah_single_1"]
    assert scores["score,none"] == scores[f"{LENGTH},none"]
    assert results["config"]["code_llava"]["counts"]["with_memory"] == 2


def test_in_a_chat_the_answer_is_begun(run_tasks: Run, recipe: Recipe) -> None:
    metadata = {"max_seq_lengths": LENGTH, "num_samples": 1}
    results = run_tasks("memory_niah_single_1", metadata=metadata, chat=True, chunk_size=16)
    (sample,) = results["samples"]["memory_niah_single_1"]
    row = next(iter(generate_rows(recipe)))
    prompt = sample["arguments"][0][0]
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith(f"<|im_start|>assistant\n{row['answer_prefix']}")


def test_prepared_rows_are_read(recipe: Recipe, tmp_path: Path) -> None:
    row = next(iter(generate_rows(recipe)))
    for length in (1024, 2048):
        write_dataset(tmp_path / str(length) / recipe.task, [row], {"max_seq_length": length})
    both = rows.ruler(task=recipe.task, ruler_data=str(tmp_path), batch_size=3)["test"]
    assert [document["category"] for document in both] == ["1024", "2048"]
    only = rows.ruler(task=recipe.task, ruler_data=str(tmp_path), max_seq_lengths=2048)["test"]
    assert [document["category"] for document in only] == ["2048"]
    with pytest.raises(DatasetError, match="vt"):
        rows.ruler(task="vt", ruler_data=str(tmp_path))
    del row["context_start"]
    write_dataset(tmp_path / "1024" / recipe.task, [row], {"max_seq_length": 1024})
    with pytest.raises(DatasetError, match=re.escape("niah_single_1 @ 1024, row 1: {'context_start': None")):
        rows.ruler(task=recipe.task, ruler_data=str(tmp_path), max_seq_lengths=1024)


@pytest.mark.parametrize(
    ("answer", "task", "score"),
    [("It is 12 and\x0034.", "vt", 1.0), ("12", "vt", 0.5), ("12", "qa_1", 1.0), ("1 2", "qa_1", 0.0)],
)
def test_scores_are_rulers(answer: str, task: str, score: float) -> None:
    document = {"answers": ["12", "34"], "task": task, "category": "4096"}
    assert rows.score_ruler(document, [answer]) == {"score": score, "4096": score}


@pytest.mark.parametrize(("answered", "score"), [(0, 1.0), (1, 0.0)])
def test_a_function_is_judged_beside_the_others_of_its_memory(answered: int, score: float) -> None:
    functions = ["def wanted(a):\n    return a + 1", "def other(b):\n    print(b)\n    return None"]
    document = {"answers": functions[:1], "distractors": functions[1:], "task": "repoqa_code", "category": "4096"}
    assert rows.score_ruler(document, [functions[answered]]) == {"score": score, "4096": score}


def test_lookups_ask_for_what_stands_in_held_out_code(run_tasks: Run) -> None:
    metadata = {"num_samples": 3, "memory_tokens": [40, 60]}
    results = run_tasks("memory_lookup", metadata=metadata, chat=True)
    samples = results["samples"]["memory_lookup"]
    assert len(samples) == 3
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.startswith("<|im_start|>user\n")
        assert sample["doc"]["answer"] in without_markers(prompt)
        assert sum(piece.is_memory for piece in split_spans(prompt, "it")) == 1
    scores = results["results"]["memory_lookup"]
    assert {"exact,none", "contains,none"} <= set(scores)
    again = rows.lookup(**metadata)["test"]
    assert [document["prompt"] for document in again] == [sample["doc"]["prompt"] for sample in samples]
    assert rows.lookup(**metadata, question_first=1)["test"][0]["prompt"].endswith(MEMORY_END)
    with pytest.raises(ConfigError, match="num_samples"):
        rows.lookup(num_samples=0)


def test_lookups_are_judged_by_the_wanted_text() -> None:
    document = {"answer": "x", "category": "constant"}
    assert rows.score_lookup(document, [" x\n"]) == {"exact": 1.0, "contains": 1.0, "constant": 1.0}
    assert rows.score_lookup(document, ["it is x."]) == {"exact": 0.0, "contains": 1.0, "constant": 1.0}
    assert rows.score_lookup(document, ["xy"]) == {"exact": 0.0, "contains": 0.0, "constant": 0.0}


def test_a_bad_line_of_the_data_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "1024" / "vt"
    write_jsonl(folder / "validation.jsonl", [{"index": 0, "input": "x"}])
    with pytest.raises(DatasetError, match="row 1"):
        rows.ruler(task="vt", ruler_data=str(tmp_path))
    (folder / "validation.jsonl").write_text(json.dumps([1]))
    with pytest.raises(DatasetError, match="line 1"):
        rows.ruler(task="vt", ruler_data=str(tmp_path))
