"""Code tasks: one true answer, where the question says it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ruler.generation.code_files import CodeFile, read_code_folder
from ruler.generation.generate import generate_rows
from ruler.registry import CODE_TASKS, get_task
from tests.support.ruler_recipes import recipe
from utils.errors import DatasetError

HEADER = re.compile(r"^# ---- (.+) ----$", re.MULTILINE)


def files_of(row: dict) -> dict[str, str]:
    """Path → text of the files in a prompt."""
    context = row["input"][row["context_start"] : row["context_end"]]
    _, *parts = HEADER.split(context)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("task", [name for name in CODE_TASKS if get_task(name).family == "code"])
def test_the_answer_is_true_and_the_only_one(task: str) -> None:
    for row in generate_rows(recipe(task, 3000, num_samples=8)):
        files = files_of(row)
        (answer,) = row["outputs"]
        name = re.search(r"the function (\w+)", row["input"][row["context_end"] :]).group(1)
        defining = [path for path, text in files.items() if f"def {name}(" in text]
        assert len(files) >= 3
        if task == "code_where":
            assert defining == [answer]
            assert sum(answer in path for path in files) == 1
            continue
        path = (
            re.search(r"of the file (\S+?)( exactly|\s|\?|$)", row["input"][row["context_end"] :]).group(1).rstrip("?")
        )
        if task == "code_lookup":
            assert path in defining
            assert len(defining) == 2  # the decoy of the same name
            assert f"def {name}():\n    return {answer}\n" in files[path]
            assert row["input"].count(answer) == 1
        else:
            assert defining == [path]
            assert answer in files[path]
            assert answer.startswith(f"def {name}(")


def test_code_rows_are_balanced_in_either_mode() -> None:
    compat, balanced = (list(generate_rows(recipe("code_copy", 2000, mode=mode))) for mode in ("compat", "balanced"))
    assert compat == balanced
    assert all(row["length"] >= 0.98 * 2000 for row in balanced)


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    for number in range(30):
        body = "\n".join(f"def first_{number}_{line}(value):\n    return value + {line}\n" for line in range(20))
        (tmp_path / f"module_{number}.py").write_text(f'"""Module {number}."""\n\n{body}')
    rows = list(generate_rows(recipe("code_where", 1500, code_dir=str(tmp_path))))
    assert all(re.fullmatch(r"module_\d+\.py", row["outputs"][0]) for row in rows)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="0 usable Python files"):
        read_code_folder(tmp_path)


def test_functions_are_planted_between_statements() -> None:
    text = '"""Doc\nat column 0\n"""\nfrom __future__ import annotations\nimport re\n\n'
    text += "@decorated\ndef one(\n):\n    pass\n"
    file = CodeFile("one.py", text)
    assert "".join(file.blocks) == text
    assert [file.blocks[number] for number in file.statements] == ["import re\n\n", "@decorated\n"]
