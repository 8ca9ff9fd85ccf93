"""The commands that keep the reference's flags: call_api.py and evaluate.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ruler.RULER.scripts.eval import evaluate
from ruler.RULER.scripts.pred import call_api
from tests.support.fake_server import by_prompt, running
from tests.support.processes import run_python

SCRIPTS = Path(__file__).parents[2] / "ruler/RULER/scripts"
SCORED = Path(__file__).parents[1] / "data/ruler_scored"


def start(script, *flags, cwd=None):
    return run_python(SCRIPTS / script, *flags, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_call_api_then_evaluate(make_dataset, tmp_path, chunks):
    data, save = make_dataset(count=5) / "1024", tmp_path / "pred"
    with running(by_prompt) as server:
        port = server.url.rpartition(":")[2]
        for index in range(chunks):
            done = start(
                "pred/call_api.py", "--data_dir", data, "--save_dir", save, "--benchmark", "synthetic", "--task",
                "niah_single_1", "--server_type", "vllm", "--server_host", "127.0.0.1", "--server_port", port,
                "--model_name_or_path", "tiny", "--temperature", "0.0", "--top_k", "32", "--top_p", "1.0",
                "--stop_words", "END,STOP", "--batch_size", "1", "--threads", "2", "--chunk_idx", index,
                "--chunk_amount", chunks, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    assert server.bodies[0]["stop"] == ["END", "STOP"]
    assert server.bodies[0]["top_k"] == 32
    done = start("eval/evaluate.py", "--data_dir", save, "--benchmark", "synthetic", "--verbose", 1)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (save / "niah_single_1.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5))
    assert rows[0]["input"].startswith("A question")
    assert [path.name for path in save.glob("*.jsonl")] == ["niah_single_1.jsonl"]
    assert (save / "summary-niah_single_1.csv").read_text().splitlines()[2] == "Score,0.0"
    assert "references ['1000000']" in done.stdout


def test_evaluate_writes_the_references_files(tmp_path):
    folder = tmp_path / "pred"
    shutil.copytree(SCORED, folder)
    for path in folder.glob("*.csv"):
        path.unlink()
    assert evaluate.main(["--data_dir", str(folder), "--benchmark", "synthetic"]) == 0
    for name in ("summary.csv", "submission.csv"):
        assert (folder / name).read_bytes() == (SCORED / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server_type", "gemini"], "OpenAI-compatible"),
        (["--ssh_server", "host"], "--ssh_server is not supported"),
        (["--chunk_idx", "2", "--chunk_amount", "2"], "chunk_idx < chunk_amount"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, capsys, flags, words):
    common = ["--data_dir", str(tmp_path), "--save_dir", str(tmp_path), "--task", "vt"]
    assert call_api.main([*common, *flags]) == 1
    assert words in capsys.readouterr().err
