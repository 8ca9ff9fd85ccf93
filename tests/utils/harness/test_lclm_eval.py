"""Files in the shape of latent-context/lclm-eval."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import pyarrow
import pyarrow.parquet

from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl
from utils.harness.tasks import lclm_eval
from utils.model.markers import wrap


def row(category: str = "niah_single_1_4096", rule: str = "ruler_string_match_all", **changes: Any) -> dict[str, Any]:
    """A row as the dataset's card describes it."""
    prompt = f"<|im_start|>user\nRead. {wrap('the number is 48213')} Which number?<|im_end|>\n<|im_start|>assistant\n"
    extra_info = {"ground_truth": {"answers": ["48213"]}, "scoring_function": rule, "index": 3, "split": "validation"}
    return {"prompt": prompt, "category": category, "extra_info": extra_info, **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_read_and_scored_by_category(
    run_tasks: Callable[..., dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    rows = [row(), row("vt_4096"), row("vt_4096", "ruler_string_match_part")]
    write(tmp_path / "ruler" / f"test-0{suffix}", rows)
    results = run_tasks("memory_lclm_eval", metadata={"lclm_eval": str(tmp_path)})
    samples = results["samples"]["memory_lclm_eval"]
    assert [sample["arguments"][0][0] for sample in samples] == [one["prompt"] for one in rows]
    scores = results["results"]["memory_lclm_eval"]
    assert {"score,none", "niah_single_1_4096,none", "vt_4096,none"} <= set(scores)
    assert results["config"]["code_llava"]["counts"]["with_memory"] == 3


def test_answers_are_judged_by_the_rows_rule() -> None:
    document = {"answers": ["a1", "b2"], "category": "x", "rule": "ruler_string_match_all"}
    assert lclm_eval.score(document, ["It is A1."]) == {"score": 0.5, "x": 0.5}
    assert lclm_eval.score(document | {"rule": "ruler_string_match_part"}, ["It is A1."]) == {"score": 1.0, "x": 1.0}


def test_categories_are_chosen_by_pattern(tmp_path: Path) -> None:
    bad = row("narrativeqa", "something_else")
    path = write(tmp_path / "all.parquet", [row(), bad, row("niah_single_2_8192")])
    found = lclm_eval.load(str(path), categories="niah_*")["test"]
    assert found["category"] == ["niah_single_1_4096", "niah_single_2_8192"]
    assert len(lclm_eval.load(str(path), categories=["*_8192"])["test"]) == 1
    with pytest.raises(DatasetError, match=re.escape("all.parquet, row 2: extra_info.scoring_function")):
        lclm_eval.load(str(path))
    with pytest.raises(DatasetError, match="no row of the categories longbench"):
        lclm_eval.load(str(path), categories="longbench")


def info(**changes: Any) -> dict[str, Any]:
    return {**row()["extra_info"], **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": "no memory"}, "no memory markers"),
        ({"prompt": "<|memory_end|>"}, "without a"),
        ({"prompt": [{"role": "user", "content": "x"}]}, "prompt must be a text"),
        ({"category": None}, "category must be a text"),
        ({"extra_info": "text"}, "extra_info must be an object"),
        ({"extra_info": {}}, "ground_truth must be an object"),
        ({"extra_info": info(ground_truth={"answers": []})}, "at least one"),
        ({"extra_info": info(ground_truth={"answers": "48213"})}, "must be texts"),
        ({"extra_info": info(ground_truth={"answers": ["a", ""]})}, "must be texts"),
        ({"extra_info": info(scoring_function=None)}, "scoring_function is None"),
    ],
)
def test_another_shape_names_file_and_row(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = write(tmp_path / "bad.jsonl", [row(), row(**changes)])
    with pytest.raises(DatasetError, match=re.escape(f"{path}, row 2") + f".*: .*{named}"):
        lclm_eval.load(str(path))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--metadata lclm_eval="):
        lclm_eval.load()
    for name, named in (("x.csv", "ends in"), ("missing.parquet", "does not exist"), ("missing.jsonl", "not exist")):
        with pytest.raises(DatasetError, match=named):
            lclm_eval.load(str(tmp_path / name))
    with pytest.raises(DatasetError, match="holds no file"):
        lclm_eval.load(str(tmp_path))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="no Parquet file"):
        lclm_eval.load(str(tmp_path))
    without = [{key: value for key, value in row().items() if key != "category"}]
    with pytest.raises(DatasetError, match="no column 'category'"):
        lclm_eval.load(str(write(tmp_path / "broken.parquet", without)))
