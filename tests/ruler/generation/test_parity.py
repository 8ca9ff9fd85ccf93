"""compat mode: the reference's rows, and the same rows however they are counted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from ruler.generation.counting import PieceCounter
from ruler.generation.generate import generate_rows
from ruler.generation.tokenizers import load_tokenizer
from ruler.registry import RULER_13, get_task
from tests.support.ruler_recipes import PACKED, recipe

REFERENCE: dict[str, list[str]] = json.loads((PACKED / "reference_rows.json").read_text())
REFERENCE_FIELDS = ("index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix")


def reference_hash(row: dict[str, Any]) -> str:
    names = [name for name in row if name in (*REFERENCE_FIELDS, "token_position_answer")]
    fields = {name: row[name] for name in names}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


@pytest.mark.parametrize("task", sorted(REFERENCE))
def test_rows_are_the_references(task: str) -> None:
    rows = list(generate_rows(recipe(task, reference_index=True)))
    assert [reference_hash(row) for row in rows] == REFERENCE[task]


@pytest.mark.parametrize("task", ["niah_single_2", "vt", "qa_1"])
def test_fields_stand_in_the_references_order(task: str) -> None:
    row = next(generate_rows(recipe(task)))
    assert tuple(row)[: len(REFERENCE_FIELDS)] == REFERENCE_FIELDS
    assert row["index"] == 0


@pytest.mark.parametrize(
    ("max_seq_length", "template", "one_line"),
    [(1300, "vicuna-chat", False), pytest.param(2500, "chatglm-chat", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("task", RULER_13)
def test_counting_in_parts_changes_nothing(task: str, max_seq_length: int, template: str, one_line: bool) -> None:
    if task == "qa_2":
        max_seq_length *= 2  # ten documents of its own
    wanted = recipe(task, max_seq_length, num_samples=2, seed=5, template=template, remove_newline_tab=one_line)
    assert list(generate_rows(wanted)) == list(generate_rows(wanted, whole=True))


def test_parts_that_do_not_add_up_are_noticed(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    wanted = recipe("niah_single_1", 700, num_samples=2)
    expected = list(generate_rows(wanted, whole=True))
    right = PieceCounter.count
    # A tokenizer whose counts of parts are wrong by one: the first row is counted whole as well, and gives it away.
    monkeypatch.setattr(PieceCounter, "count", lambda self, pieces: right(self, pieces) + (1 if self.adds_up else 0))
    assert list(generate_rows(wanted)) == expected
    assert "do not add up" in caplog.text


@pytest.mark.parametrize("one_line", [False, True])
@pytest.mark.parametrize("task", RULER_13)
def test_context_offsets_enclose_the_context(task: str, one_line: bool) -> None:
    for row in generate_rows(recipe(task, num_samples=2, remove_newline_tab=one_line, template="meta-chat")):
        text, start, end = row["input"], row["context_start"], row["context_end"]
        before, _, behind = get_task(task).template.partition("{context}")
        assert text[:start].split()[-1] == before.split()[-1]
        assert text[end:].split()[0] in (behind.split()[0], "What")
        assert text[start:end].strip()
        if not task.startswith("qa"):  # the stand-in questions have answers that are nowhere
            assert all(answer in text[start:end] for answer in row["outputs"])


def test_position_of_the_answer_is_counted_in_tokens() -> None:
    wanted = recipe("niah_multikey_1")
    tokenizer = load_tokenizer("hf", wanted.tokenizer)
    for row in generate_rows(wanted):
        before = row["input"][: row["input"].index(row["outputs"][0])]
        assert row["token_position_answer"] == len(tokenizer.encode(before))
