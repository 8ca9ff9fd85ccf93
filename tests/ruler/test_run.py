"""The whole benchmark from one command, on a tiny checkpoint: data, answers in several arms, report, resume."""

from __future__ import annotations

import json

import pytest

from ruler.__main__ import COMMANDS, main
from tests.support.processes import traced


@pytest.fixture
def long_reader(copied):
    """A tiny checkpoint whose decoder has room for RULER's prompts, one token a byte."""
    folder = copied("code-llava")
    path = folder / "llm" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 4096}))
    return folder


@pytest.mark.slow
def test_run_from_data_to_report_and_again_without_work(long_reader, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["run", "--output-dir", str(out), "--model", str(long_reader), "--tasks", "niah_single_1,niah_multikey_2",
               "--lengths", "1100,1300", "--num-samples", "1", "--chunk-size", "4,16", "--workers", "1",
               "--batch-size", "2"]  # fmt: skip
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(out / "report" / "report.html")
    report = json.loads((out / "report/report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["full", "memory@4", "memory@16"]
    assert report["notes"] == []  # complete, and all of the same rows
    text, by_four, by_sixteen = (run["lengths"][1] for run in report["runs"])
    assert text["length"] == 1300
    assert text["ratio"] == 1
    assert by_four["ratio"] == pytest.approx(4, abs=0.1)
    assert by_sixteen["ratio"] == pytest.approx(16, abs=0.4)
    # Two marker tokens around each memory; the rest is the same text.
    assert by_four["tokens_before"] == by_sixteen["tokens_before"] == text["tokens_before"] + 2
    assert len(report["pictures"]) == 5
    assert [line["run"] for line in report["arms"]] == ["full", "memory@4", "memory@16"] * 2
    page = (out / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 5

    predictions = {path: path.read_bytes() for path in (out / "runs").rglob("*.jsonl")}
    assert len(predictions) == 3 * 2 * 2
    monkeypatch.setattr(
        "ruler.answering.backends.open_backend", lambda settings: pytest.fail("a finished run loads no model")
    )
    assert main(command) == 0
    assert {path: path.read_bytes() for path in (out / "runs").rglob("*.jsonl")} == predictions


@pytest.mark.slow
def test_every_arm_shows_what_it_may(long_reader, tmp_path, capsys):
    command = ["run", "--output-dir", str(tmp_path), "--model", str(long_reader),
               "--tasks", "niah_single_1,niah_multikey_2", "--lengths", "1100", "--num-samples", "2",
               "--chunk-size", "8", "--workers", "1", "--arms", "all", "--json"]  # fmt: skip
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["notes"] == []
    entries = {run["name"]: run["lengths"][0] for run in report["runs"]}
    assert list(entries) == ["none", "full", "memory@8", "truncated@8", "bm25@8", "expand@8", "random@8"]
    context = entries["full"]["tokens_after"] - entries["none"]["tokens_after"]
    for name, entry in entries.items():
        rows = entry["tokens_after"] - entries["none"]["tokens_after"]
        # No arm has more rows than its budget and the two markers around it; it uses at least half of them.
        wanted = {"none": 0.0, "full": context}.get(name, context / 8)
        assert wanted / 2 <= rows <= wanted + 4, name
        assert entry["tasks"]["niah_multikey_2"]["rows"] == 2
    assert entries["none"]["ratio"] is None
    assert entries["truncated@8"]["ratio"] == pytest.approx(8, abs=0.2)
    compared = {line["run"]: line for line in report["arms"]}
    assert compared["full"]["to_full"] is None
    assert compared["expand@8"]["to_bm25"]["count"] == 4


@pytest.mark.slow
def test_functions_are_asked_for_and_judged_against_the_rest_of_the_memory(long_reader, tmp_path):
    out = tmp_path / "out"
    command = ["run", "--output", str(out), "--model", str(long_reader), "--tasks", "repoqa_name,repoqa_code",
               "--lengths", "3000", "--num-samples", "2", "--chunk-size", "8", "--workers", "1"]  # fmt: skip
    assert main(command) == 0
    report = json.loads((out / "report/report.json").read_text())
    entries = [run["lengths"][0] for run in report["runs"]]
    assert [(entry["score"], entry["code_score_tasks"], entry["tasks"].keys()) for entry in entries] == [
        (None, 2, {"repoqa_name", "repoqa_code"})
    ] * 2
    assert "## Code tasks, 3000 tokens" in (out / "report/report.md").read_text()
    # The right answers, put in place of the random model's, are scored as such: what judging needs came along.
    path = out / "runs/full/3000/repoqa_code.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(len(row["others"]["distractors"]) >= 3 for row in rows)
    rows[0]["pred"] = f"```python\n{rows[0]['outputs'][0]}\n```"
    rows[1]["pred"] = rows[1]["others"]["distractors"][0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(out / "runs/full")]) == 0
    scores = json.loads((out / "runs/full/scores.json").read_text())["lengths"][0]["tasks"]["repoqa_code"]
    assert (scores["score"], scores["strict"]) == (50.0, 50.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chunk-size", "4,x"], "'x' is not a number of tokens"),
        (["--chunk-sizes", ""], "need a --chunk-size"),
        (["--arms", "full,most"], "no arm 'most'"),
        (["--where", "server"], "--tokenizer-path is needed"),
        (["--concurrency", "0"], "--concurrency must be positive, got 0"),
        # The embedded pair.
        (
            ["--arms", "expand", "--chunk-size", "32"],
            "expand@32 has latents at chunk size 64, the pair was trained for",
        ),
        (["--arms", "expand", "--chunk-size", "32", "--where", "server", "--tokenizer-path", "x"], "at chunk size 64"),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path, capsys, flags, words):
    assert main(["run", "--output-dir", str(tmp_path), *flags]) == 1
    assert words in capsys.readouterr().err


def test_help_is_quick_because_it_loads_no_libraries():
    """All flags of all subcommands and of the commands that keep the reference's, in one process."""
    scripts = ("data.prepare", "pred.call_api", "eval.evaluate")
    program = "".join(f"import ruler.RULER.scripts.{name}\n" for name in scripts)
    program += "from ruler.__main__ import build_parser\nprint(build_parser().format_help())"
    text, loaded = traced("-c", program)
    assert all(command in text for command in COMMANDS)
    assert not {"torch", "transformers", "tokenizers", "openai", "matplotlib", "numpy", "nltk"} & loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"python -m ruler {command}" in capsys.readouterr().out.partition("examples:")[2]
