"""Dataset folders: what is written is read, what is damaged is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ruler.layout import claim_run_folder, read_dataset, write_dataset
from ruler.registry import CODE_TASKS, EXTRA_TASKS, RULER_13, TASKS, parse_lengths, resolve_tasks
from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl

ROW: dict[str, Any] = {"index": 0, "input": "text", "outputs": ["a"], "length": 3, "answer_prefix": " A:"}


def test_round_trip(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, [ROW], {"seed": 1}, "test")
    assert read_dataset(tmp_path, "test") == (written, [ROW])
    assert written["num_rows"] == 1
    assert written["seed"] == 1


def test_rows_of_the_reference_have_no_manifest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", [ROW])
    assert read_dataset(tmp_path) == ({}, [ROW])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": []}, "'outputs' is empty"),
        ({"outputs": "a"}, "'outputs' must be list"),
        ({"length": None}, "'length' must be int"),
    ],
)
def test_wrong_rows(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / "validation.jsonl", [ROW, {**ROW, **changes}])
    with pytest.raises(DatasetError, match=f"row 2: field {message}"):
        read_dataset(tmp_path)


def test_missing_and_changed_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="prepare the dataset first"):
        read_dataset(tmp_path)
    write_dataset(tmp_path, [ROW], {})
    write_jsonl(tmp_path / "validation.jsonl", [ROW, ROW])
    with pytest.raises(DatasetError, match="not the file its manifest describes"):
        read_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DatasetError, match="not a dataset manifest"):
        read_dataset(tmp_path)


def test_task_names() -> None:
    assert len(RULER_13) == 13
    assert resolve_tasks("vt,code,vt")[:4] == ("vt", "code_lookup", "code_where", "code_copy")
    assert set(resolve_tasks("code,code-extra")) == set(CODE_TASKS)
    # What needs an extra is never asked for unless it is named.
    assert EXTRA_TASKS == ("repoqa_name_javascript", "repoqa_code_javascript", "humaneval_haystack")
    assert set(resolve_tasks("all")) == set(TASKS) - set(EXTRA_TASKS)
    for wrong, message in (("vt,x", "unknown task 'x'"), (",", "no task in")):
        with pytest.raises(ConfigError, match=message):
            resolve_tasks(wrong)


def test_a_dataset_is_no_place_for_predictions(tmp_path: Path) -> None:
    write_dataset(tmp_path, [ROW], {})
    with pytest.raises(DatasetError, match="holds a dataset"):
        claim_run_folder(tmp_path, {}, "validation")


def test_lengths() -> None:
    assert parse_lengths("4096, 32k,1M,4k") == [4096, 32768, 1048576]
    with pytest.raises(ConfigError, match="no length given"):
        parse_lengths(" ,")
