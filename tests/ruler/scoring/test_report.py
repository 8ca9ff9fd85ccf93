"""The report: the same rows side by side, as Markdown, CSV, JSON and pictures."""

from __future__ import annotations

import csv
import json
import math

import pytest

from ruler.__main__ import main
from ruler.scoring.arms import compare_arms
from ruler.scoring.figures import (
    needle_depth_by_length,
    score_by_length,
    score_by_ratio,
    score_by_rows,
    tasks_by_length,
)
from ruler.scoring.report import comparison_notes, write_report
from ruler.scoring.score import score_run
from utils.errors import ConfigError

TASKS = ("niah_single_1", "vt", "code_where")


def write_run(root, good, latents=None, lengths=(1024, 2048), tasks=TASKS, sha="a", arm=None):
    """A run in which the first `good` of four rows are right."""
    for length in lengths:
        folder = root / str(length)
        folder.mkdir(parents=True)
        for task in tasks:
            rows = []
            for number in range(4):
                others = {"prompt_tokens": 24 + (latents or 100)}
                if latents:
                    others |= {"memory_tokens": 100, "num_latents": latents}
                if task == "niah_single_1":
                    others["depths"] = [number / 4]
                pred = "yes" if number < good else ""
                rows.append({"index": number, "pred": pred, "outputs": ["yes"], "others": others})
            (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {task: {"num_rows": 4, "rows_sha256": sha} for task in tasks}
        (folder / "manifest.json").write_text(json.dumps({"settings": {"backend": "x", "arm": arm}, "data": data}))
    return root


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "text", 4), write_run(tmp_path / "memory", 2, latents=25)]


@pytest.mark.slow
def test_all_files_are_written_and_agree(runs, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", *map(str, runs), "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    text = (out / "report.md").read_text()
    assert text.startswith("# RULER report\n")
    assert "| text | 100.0" in text
    assert "| memory | 50.0" in text
    assert "## Code tasks, 1024 tokens" in text
    report = json.loads((out / "report.json").read_text())
    assert len(report["pictures"]) == 4
    for name in report["pictures"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<h1>RULER report</h1>" in page
    with (out / "report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 3
    assert [row["score"] for row in rows if row["run"] == "memory"] == ["50.0"] * 6


def test_tokens_before_and_after_stand_beside_each_other(runs):
    text, memory = (score_run(run)["lengths"][0] for run in runs)
    assert (text["tokens_before"], text["tokens_after"], text["ratio"]) == (124, 124, 1.0)
    assert (memory["tokens_before"], memory["tokens_after"], memory["ratio"]) == (124, 49, 4.0)


def test_incomplete_and_different_rows_are_noted(tmp_path):
    one = write_run(tmp_path / "one", 4, tasks=("vt",))
    other = write_run(tmp_path / "other", 4, tasks=("vt",), sha="b")
    path = other / "1024/vt.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    notes = comparison_notes([score_run(one), score_run(other)])
    assert notes[0] == "other, vt at 1024: only 3 of 4 rows are answered."
    assert notes[1] == "The runs answered different rows, so do not compare: vt at 1024, vt at 2048."


def test_figures_show_the_data(runs):
    scored = [score_run(run) for run in runs]
    lines = score_by_length(scored).axes[0].get_lines()
    assert list(lines[0].get_ydata()) == [100.0, 100.0]
    grid = tasks_by_length(scored).axes[1].images[0].get_array()
    assert grid.tolist() == [[50.0, 50.0]] * 3
    depths = needle_depth_by_length(scored).axes[1].images[0].get_array().filled(math.nan)
    assert [depths[b][0] for b in (0, 2, 5, 7)] == [100.0, 100.0, 0.0, 0.0]
    assert math.isnan(depths[1][0])
    assert list(score_by_ratio(scored).axes[0].get_lines()[0].get_xdata()) == [1.0, 4.0]


def test_many_runs_stand_in_lines(runs):
    scored = [score_run(run) for run in runs]
    many = [{**scored[0], "name": f"arm {number}"} for number in range(7)]
    figure = tasks_by_length(many)
    assert [axes.get_title() for axes in figure.axes[:-1]] == [run["name"] for run in many]  # the last is the scale
    assert [axes.get_subplotspec().rowspan.start for axes in figure.axes[:-1]] == [0] * 4 + [1] * 3
    one_line = tasks_by_length(many[:4])
    assert figure.get_figwidth() == one_line.get_figwidth()
    assert figure.get_figheight() > 1.7 * one_line.get_figheight()


def test_arms_are_compared_row_by_row(tmp_path):
    right = {"none": 0, "full": 4, "bm25@4": 1, "memory@4": 2}
    runs = [score_run(write_run(tmp_path / arm, good, latents=25, arm=arm)) for arm, good in right.items()]
    lines = {line["run"]: line for line in compare_arms(runs) if line["length"] == 1024}
    memory = lines["memory@4"]
    assert (memory["rows"], memory["score"], memory["retention"]) == (12, 50.0, 0.5)
    assert (memory["to_full"]["difference"], memory["to_full"]["count"]) == (-0.5, 12)
    assert memory["to_bm25"]["difference"] == 0.25
    assert 0 <= memory["to_bm25"]["low"] < 0.25 < memory["to_bm25"]["high"]
    assert lines["full"]["to_full"] is None
    assert lines["full"]["to_bm25"] is None
    assert score_by_rows(runs).axes[0].get_legend_handles_labels()[1] == ["none", "full", "bm25", "memory"]


def test_rows_of_other_files_are_not_compared(tmp_path):
    runs = [write_run(tmp_path / arm, 4, tasks=("vt",), arm=arm, sha=arm) for arm in ("full", "memory@4")]
    assert [line["to_full"] for line in compare_arms([score_run(run) for run in runs])] == [None] * 4


def test_runs_that_are_no_arms_are_not_compared(runs):
    assert compare_arms([score_run(run) for run in runs]) == []
    assert score_by_rows([score_run(run) for run in runs]) is None


def test_pictures_without_data_are_left_out(tmp_path):
    scored = [score_run(write_run(tmp_path / "only", 1, lengths=(1024,), tasks=("vt",)))]
    assert needle_depth_by_length(scored) is None
    assert score_by_ratio(scored) is None


def test_runs_of_one_name_are_refused(tmp_path):
    runs = [write_run(tmp_path / folder / "same", 1, tasks=("vt",)) for folder in "ab"]
    with pytest.raises(ConfigError, match="same name"):
        write_report(runs, tmp_path / "report")
