"""RepoQA's tasks: one function answers, nothing gives it away, every row is full."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from ruler.generation.code_files import LANGUAGES, read_code_folder
from ruler.generation.data_files import RulerData
from ruler.generation.functions import CodeFunction, functions_in, gives_away
from ruler.generation.generate import describe, generate_rows
from ruler.generation.tasks.repoqa import goes_with
from ruler.generation.tokenizers import load_tokenizer
from ruler.registry import get_task
from ruler.scoring.similarity import function_value
from tests.support.ruler_recipes import recipe
from utils.errors import DatasetError

OWN = str(Path(__file__).parents[3] / "utils")
TASKS = ("repoqa_name", "repoqa_code")


def shown(row: dict, comment: str = "#") -> list[str]:
    """The functions of a prompt, each with its path before it."""
    context = row["input"][row["context_start"] : row["context_end"]]
    parts = f"\n{context}".split(f"\n{comment} ")
    return [part for part in parts if part.partition("\n")[0].endswith((".py", ".h", ".hpp", ".cpp", ".cc", ".js"))]


def description(row: dict) -> str:
    return row["input"][row["context_end"] :].partition("describes")[2].partition("\n")[2]


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_in_the_memory_and_nowhere_else(task: str, length: int) -> None:
    documented = {
        function.description: function
        for file in read_code_folder(Path(OWN)).files
        for function in functions_in(file, "python")
    }
    for row in generate_rows(recipe(task, length, num_samples=6, code_dir=OWN)):
        (answer,) = row["outputs"]
        wanted = documented[description(row)]
        assert answer == (wanted.name if task == "repoqa_name" else wanted.code)
        functions = shown(row)
        assert len(functions) >= 4
        assert [wanted.code in function for function in functions].count(True) == 1
        assert [wanted.name.lower() in function.lower() for function in functions].count(True) == 1
        assert not gives_away(wanted.name, description(row))
        # No function's documentation is shown, so that its absence does not point at the answer.
        memory = " ".join(row["input"][: row["context_end"]].split())
        assert not any(text in memory for text in documented if text)


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_full_even_and_the_same_again(task: str) -> None:
    wanted = recipe(task, 1024, num_samples=40, code_dir=OWN)
    rows = list(generate_rows(wanted))
    tokenizer = load_tokenizer("hf", wanted.tokenizer)
    depths = []
    for row in rows:
        tokens = tokenizer.count([row["input"] + row["answer_prefix"]])[0]
        assert row["length"] == tokens + get_task(task).tokens_to_generate
        assert 0.98 * 1024 <= row["length"] <= 1024
        functions = shown(row)
        (place,) = (number for number, function in enumerate(functions) if row["outputs"][0] in function)
        depths.append((place + 0.5) / len(functions))
    depths.sort()
    assert max(abs((rank + 0.5) / len(depths) - depth) for rank, depth in enumerate(depths)) < 0.15
    assert len({description(row) for row in rows}) == len(rows)  # every row asks for another function
    assert list(generate_rows(wanted, 38, 40)) == rows[38:]
    assert next(generate_rows(recipe(task, 1024, seed=7, code_dir=OWN))) != rows[0]
    assert next(generate_rows(recipe(task, 1024, mode="balanced", code_dir=OWN))) == rows[0]


def test_the_wanted_code_fits_the_answer_and_is_told_from_the_others() -> None:
    wanted = recipe("repoqa_code", 4096, num_samples=8, code_dir=OWN)
    tokenizer = load_tokenizer("hf", wanted.tokenizer)
    for row in generate_rows(wanted):
        (answer,), others = row["outputs"], row["others"]["distractors"]
        assert tokenizer.count([answer])[0] < get_task("repoqa_code").tokens_to_generate
        assert len(others) == len(shown(row)) - 1
        assert answer not in others
        assert function_value(answer, [answer], others, "python") == (1.0, 1.0)
        assert all(function_value(other, [answer], others, "python")[0] == 0 for other in others)


def test_installed_packages_and_their_licences() -> None:
    (row,) = generate_rows(recipe("repoqa_name", 1024, num_samples=1))
    assert row["outputs"][0] in row["input"]
    code = describe(recipe("repoqa_name", 1024))["data"]["code"]
    assert code["licences"].keys() == code["packages"].keys() >= {"networkx", "peft"}
    assert code["licences"]["networkx"] == "BSD-3-Clause"
    assert (code["source"], len(code["sha256"])) == ("installed packages", 64)


@pytest.mark.parametrize("language", ["cpp", "javascript"])
def test_other_languages(language: str) -> None:
    (package,) = LANGUAGES[language].packages
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (uv sync --extra code-tasks)")
    for task in (f"repoqa_name_{language}", f"repoqa_code_{language}"):
        for row in generate_rows(recipe(task, 1024, num_samples=3)):
            (answer,), functions = row["outputs"], shown(row, "//")
            assert len(functions) >= 4
            assert [answer in function for function in functions].count(True) == 1
            assert row["length"] >= 0.98 * 1024
            if "code" in task:
                assert function_value(answer, [answer], row["others"]["distractors"], language) == (1.0, 1.0)
    assert describe(recipe(f"repoqa_name_{language}", 1024))["data"]["code"]["licences"][package]


def test_a_language_without_files_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"0 usable C\+\+ files"):
        next(generate_rows(recipe("repoqa_name_cpp", 1024, code_dir=str(tmp_path))))

    def not_there(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_there)
    with pytest.raises(DatasetError, match="uv sync --extra code-tasks"):
        RulerData().code_files("javascript")


def test_too_few_functions_are_an_error(tmp_path: Path) -> None:
    for number in range(4):
        body = "".join(f"    step_{number}_{line} = {line}\n" for line in range(20))
        (tmp_path / f"module_{number}.py").write_text(f"def function_{number}():\n{body}    return {number}\n")
    with pytest.raises(DatasetError, match="none of the 4 files has a function"):
        next(generate_rows(recipe("repoqa_name", 4096, code_dir=str(tmp_path))))


@pytest.mark.parametrize("task", TASKS)
def test_a_budget_that_is_too_small_is_an_error(task: str) -> None:
    with pytest.raises(DatasetError, match=f"{task} does not fit into 140 tokens.*--max-seq-length of"):
        next(generate_rows(recipe(task, 140, code_dir=OWN)))


def test_twins_and_functions_that_name_the_wanted_one_stay_out() -> None:
    def function(name: str, code: str, description: str = "", path: str = "a.py") -> CodeFunction:
        return CodeFunction(name, path, code, description)

    wanted = function(
        "settle_all", "def settle_all(ledger):\n    return sum(entry.amount for entry in ledger)", "Sums."
    )
    other = "def other(x):\n    if x:\n        raise ValueError(x)"
    assert goes_with(function("other", other), wanted, {"settle_all"})
    assert not goes_with(function("other", other), wanted, {"settle_all", "other"})
    assert not goes_with(function("other", other, "Sums."), wanted, {"settle_all"})
    assert not goes_with(function("other", f"{other} or Settle_All(x)"), wanted, {"settle_all"})
    assert not goes_with(function("other", other, path="settle_all.py"), wanted, {"settle_all"})
    assert not goes_with(function("twin", wanted.code.replace("settle_all", "twin")), wanted, {"settle_all"})
