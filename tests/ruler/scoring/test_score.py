"""Scores: the reference's files to the byte, and what stands beside them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from ruler.__main__ import main
from ruler.scoring.score import score_run
from utils.errors import DatasetError

SCORED = Path(__file__).parents[2] / "data/ruler_scored"


@pytest.fixture
def scored(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(SCORED, folder)
    for name in ("summary.csv", "submission.csv"):
        (folder / name).unlink()
    return folder


def write(folder, task, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prediction(index, pred, outputs, **others):
    return {"index": index, "pred": pred, "outputs": outputs, "others": others}


def test_the_references_files_to_the_byte(scored, capsys):
    assert main(["score", str(scored)]) == 0
    for name in ("summary.csv", "submission.csv"):
        assert (scored / name).read_bytes() == (SCORED / name).read_bytes()
    assert "48.10" in capsys.readouterr().out


def test_a_single_task_has_the_references_file_name(tmp_path):
    write(tmp_path, "vt", [prediction(0, "A, b", ["A", "B", "C"])])
    score_run(tmp_path)
    assert (tmp_path / "summary-vt.csv").read_text() == "0,1\nTasks,vt\nScore,66.67\nNulls,0/1\n"


def test_submission_quotes_and_ids_like_the_reference(tmp_path):
    write(tmp_path, "qa_1", [prediction(7, ' say "hi", now\x0b', ["hi"], id=42)])
    score_run(tmp_path)
    text = (tmp_path / "submission.csv").read_text()
    assert text == 'Task,ID,Prediction\nqa_1,42,"say ""hi"", now"\n'
    assert list(csv.reader(text.splitlines()))[1] == ["qa_1", "42", 'say "hi", now']


def test_lengths_averages_and_code_tasks_apart(tmp_path):
    for length, pred in ((1024, "one two"), (2048, "one")):
        write(tmp_path / str(length), "vt", [prediction(0, pred, ["one", "two"])])
        write(tmp_path / str(length), "code_where", [prediction(0, "", ["x.py"])])
    result = score_run(tmp_path)
    assert [(e["length"], e["score"], e["code_score"]) for e in result["lengths"]] == [
        (1024, 100.0, 0.0),
        (2048, 50.0, 0.0),
    ]
    assert result["averages"] == {"mean": 75.0, "weighted_increasing": 66.67, "weighted_decreasing": 83.33}
    assert result["effective_length"] == 1024
    assert json.loads((tmp_path / "scores.json").read_text()) == result


def test_tokens_needles_and_missing_rows_are_told(tmp_path):
    folder = tmp_path / "4096"
    write(
        folder,
        "niah_multivalue",
        [
            prediction(0, "11", ["11", "22"], prompt_tokens=100, memory_tokens=80, num_latents=10, depths=[0.1, 0.9]),
            prediction(1, "", ["33", "44"], prompt_tokens=110, memory_tokens=90, num_latents=12, depths=[0.5, 0.6]),
        ],
    )
    manifest = {"settings": {}, "data": {"niah_multivalue": {"num_rows": 3}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    scores = score_run(tmp_path)["lengths"][0]["tasks"]["niah_multivalue"]
    assert scores["prompt_tokens"] == 105
    assert scores["memory_tokens"] == 85
    assert scores["num_latents"] == 11
    assert scores["needles"] == [[0.1, 1.0], [0.9, 0.0], [0.5, 0.0], [0.6, 0.0]]
    assert (scores["rows"], scores["expected_rows"], scores["nulls"]) == (2, 3, "1/2")


def test_a_half_written_last_line_counts_as_missing(scored, caplog):
    path = scored / "vt.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert score_run(scored)["lengths"][0]["tasks"]["vt"]["rows"] == 4
    assert "half written" in caplog.text


def test_a_whole_last_line_needs_no_newline(scored):
    path = scored / "vt.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert score_run(scored)["lengths"][0]["tasks"]["vt"]["rows"] == 5


def test_nothing_to_score_broken_lines_and_empty_references(tmp_path, capsys):
    assert main(["score", str(tmp_path)]) == 1
    assert "holds no predictions" in capsys.readouterr().err
    write(tmp_path, "vt", [prediction(0, "x", ["x"]), prediction(1, "x", [])])
    with pytest.raises(DatasetError, match=r"vt\.jsonl, row 2: .*no references"):
        score_run(tmp_path)
    (tmp_path / "vt.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(DatasetError, match="line 1: expected a prediction"):
        score_run(tmp_path)


def test_half_surrogates_do_not_break_the_files(tmp_path):
    write(tmp_path, "vt", [prediction(0, "a \ud83d b", ["a"])])
    score_run(tmp_path)
    assert "a \\ud83d b" in (tmp_path / "submission.csv").read_text(encoding="utf-8")
