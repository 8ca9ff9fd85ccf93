"""The built-in data: made by the script beside it, and fair to ask about."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from ruler.builtin.make import make_files
from ruler.generation.data_files import BUILTIN, RulerData
from ruler.generation.generate import generate_rows
from ruler.registry import RULER_13
from tests.support.ruler_recipes import recipe


@pytest.mark.slow
def test_files_are_what_the_script_makes() -> None:
    """Compared unpacked: another zlib may pack differently."""
    for name, content in make_files().items():
        assert json.loads(gzip.decompress(content)) == json.loads(gzip.decompress((BUILTIN / name).read_bytes()))
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) < 3_000_000


@pytest.mark.slow
def test_squad_questions_have_one_true_answer() -> None:
    source = RulerData().questions("squad")
    assert len({question.text for question in source.questions}) == len(source.questions)
    for question in source.questions:
        (gold,) = question.gold
        assert all(answer in source.documents[gold] for answer in question.answers)
        # The town's own paragraphs; only the gold one may say the answer.
        paragraphs = [source.documents[number] for number in (gold, *question.related)]
        said = re.compile("|".join(rf"\b{re.escape(answer)}\b" for answer in question.answers))
        assert [text for text in paragraphs if said.search(text)] == paragraphs[:1]
        town = next(word for word in re.findall(r"[A-Z]\w+", question.text)[1:] if word in paragraphs[0])
        assert sum(town in text for text in source.documents) == len(paragraphs)


@pytest.mark.slow
def test_hotpot_answers_are_in_the_given_documents() -> None:
    source = RulerData().questions("hotpotqa")
    for question in source.questions:
        assert len(question.gold) == 10
        given = [source.documents[number] for number in question.gold]
        assert any(question.answers[0] in text for text in given)


@pytest.mark.parametrize("task", RULER_13)
def test_every_task_runs_on_it(task: str) -> None:
    rows = list(generate_rows(recipe(task, 2048, data_dir=None, num_samples=2)))
    assert len(rows) == 2
    assert all(row["length"] <= 2048 for row in rows)
