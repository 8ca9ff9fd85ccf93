"""HumanEval's haystack, of a file of the same shape and of the real one: solutions as memory, a text as question."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ruler.generation.generate import describe, generate_rows
from ruler.generation.humaneval import HUMAN_EVAL, load_problems
from tests.support.ruler_recipes import recipe
from utils.errors import DatasetError

SUMMED: dict[str, Any] = {
    "task_id": "Own/1",
    "prompt": 'from typing import List\n\n\ndef widest_gap(values: List[int]) -> int:\n    """ Give back how far '
    'apart two neighbours of a sorted list\n    can be at most.\n    >>> widest_gap([1, 5, 6])\n    4\n    """\n',
    "entry_point": "widest_gap",
    "canonical_solution": "    values = sorted(values)\n    return max(map(sub, values[1:], values))\n",
    "test": "def check(candidate): ...",
}
HELPED: dict[str, Any] = {
    "task_id": "Own/2",
    "prompt": 'def halve(x):\n    """ Half of it. """\n    return x // 2\n\n\ndef count_steps(x):\n    """\n    Tell '
    'how often a number must become half of itself before nothing is left.\n    count_steps(4) is 3.\n    """\n',
    "entry_point": "count_steps",
    "canonical_solution": "    steps = 0\n    while x:\n        x = halve(x)\n        steps += 1\n    return steps\n",
    "test": "",
}


def write(folder: Path, *problems: dict[str, Any]) -> Path:
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (folder / HUMAN_EVAL).write_bytes(gzip.compress(lines.encode()))
    return folder


def test_a_problem_becomes_a_function(tmp_path: Path) -> None:
    summed, helped = load_problems(write(tmp_path, SUMMED, HELPED)).functions
    assert summed.description == "Give back how far apart two neighbours of a sorted list can be at most."
    assert summed.code == f"def widest_gap(values: List[int]) -> int:\n{SUMMED['canonical_solution']}".rstrip()
    assert helped.description.endswith("before nothing is left.")
    assert helped.code.startswith("def halve(x):\n    return x // 2\n\ndef count_steps(x):\n    steps = 0")
    assert "import" not in summed.code + helped.code


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({**SUMMED, "entry_point": "other"}, "line 2: expected one function other"),
        ({**SUMMED, "canonical_solution": "    return ("}, "line 2: prompt and solution are no Python code"),
        ({"task_id": "Own/1"}, "line 2: expected an object with the texts task_id, prompt"),
    ],
)
def test_another_shape_is_an_error(tmp_path: Path, problem: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_problems(write(tmp_path, HELPED, problem))


def test_a_file_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / HUMAN_EVAL).write_bytes(b"{}")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_problems(tmp_path)


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_there)
    with pytest.raises(DatasetError, match=r"human-eval.*not installed: run uv sync --extra code-tasks"):
        load_problems(None)


def test_few_problems_are_followed_by_functions_of_packages(tmp_path: Path) -> None:
    folder = str(write(tmp_path, SUMMED, HELPED))
    first, second, third = generate_rows(recipe("humaneval_haystack", 1024, num_samples=3, data_dir=folder))
    for row, other in ((first, second), (second, first)):
        assert row["input"].count(row["outputs"][0]) == 1
        assert other["outputs"][0] in row["input"]
        assert row["input"].count("# Own/") == 2
        assert row["length"] >= 0.98 * 1024
    # Every problem once, then from the start again.
    assert {first["outputs"][0], second["outputs"][0]} == {"widest_gap", "count_steps"}
    assert third["outputs"] == first["outputs"]
    assert third["input"] != first["input"]


def test_the_real_problems() -> None:
    try:
        importlib.metadata.distribution("human-eval")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("human-eval is not installed (uv sync --extra code-tasks)")
    wanted = recipe("humaneval_haystack", 2048, num_samples=20)
    problems = load_problems(None).functions
    answers = []
    for row in generate_rows(wanted):
        (answer,) = row["outputs"]
        context = row["input"][row["context_start"] : row["context_end"]]
        names = re.findall(r"^# HumanEval/\d+$", context, re.MULTILINE)
        assert len(names) == len(set(names)) >= 12
        assert re.findall(rf"^def {answer}\(", context, re.MULTILINE)
        question = row["input"][row["context_end"] :]
        (wanted_one,) = (item for item in problems if item.description and question.endswith(item.description))
        assert wanted_one.name == answer
        assert row["input"].count(answer) == wanted_one.code.count(answer)
        assert 0.98 * 2048 <= row["length"] <= 2048
        answers.append(answer)
    assert len(set(answers)) == 20
    assert next(generate_rows(wanted, 18, 19))["outputs"] == [answers[18]]
    data = describe(wanted)["data"]
    assert data[HUMAN_EVAL]["licences"] == {"human-eval": "The MIT License"}
    assert data[HUMAN_EVAL]["num_problems"] == 164
