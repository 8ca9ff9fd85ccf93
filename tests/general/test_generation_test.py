"""The command that sends an embeddings file to a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from general import generation_test
from tests.support import fake_server
from tests.support.fake_server import FakeServer, refuse, stream
from tests.support.processes import run_python

ROWS = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server.running() as running:
        yield running


@pytest.fixture
def embedding_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, ROWS)
    return path


def run(server: FakeServer, embedding_file: Path, *flags: str) -> int:
    return generation_test.main(["--embedding-file", str(embedding_file), "--server-url", server.url, *flags])


def sent_rows(server: FakeServer) -> np.ndarray:
    body = server.requests[-1][1]
    blob = body.get("prompt_embeds") or body["messages"][0]["content"][0]["data"]
    return fake_server.rows_of(blob).numpy()


def test_the_whole_file_is_sent_and_the_answer_printed(
    server: FakeServer, embedding_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, embedding_file, "--temperature", "0.5", "--max_tokens", "9") == 0
    assert capsys.readouterr().out == "fine\n"
    assert np.array_equal(sent_rows(server), ROWS)
    path, body = server.requests[-1]
    assert path == "/v1/completions"
    assert (body["temperature"], body["max_tokens"], "top_p" in body) == (0.5, 9, False)


def test_json_reports_usage_timings_and_truncation(
    server: FakeServer, embedding_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(server, embedding_file, "--max-prompt-rows", "4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["model"], result["file_rows"], result["sent_rows"]) == ("fine", "tiny", 6, 4)
    assert (result["prompt_tokens"], result["completion_tokens"]) == (7, 3)
    assert result["total_s"] > 0
    assert np.array_equal(sent_rows(server), ROWS[:4])
    assert "the first 4 of 6 rows" in caplog.text


def test_chat_puts_the_instruction_after_the_rows(server: FakeServer, embedding_file: Path) -> None:
    assert run(server, embedding_file, "--api", "chat", "--instruction", "Explain it.") == 0
    path, body = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "Explain it."}
    assert np.array_equal(sent_rows(server), ROWS)


@pytest.mark.parametrize("as_json", [False, True])
def test_stream(server: FakeServer, embedding_file: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    server.script = [fake_server.answer("probe"), stream("one ", "two")]
    assert run(server, embedding_file, "--stream", *(["--json"] if as_json else [])) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["text"] == "one two"
        assert json.loads(out)["first_text_s"] > 0
    else:
        assert out == "one two\n"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ROWS[0], "expected a matrix"),
        (np.full((2, 8), np.nan, np.float32), "NaN"),
        (ROWS.astype(np.float64), "float64"),
        (np.array([{}], object), "not a readable"),
    ],
)
def test_a_bad_file_sends_nothing(
    server: FakeServer, tmp_path: Path, array: np.ndarray, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    assert run(server, tmp_path / "bad.npy") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert server.requests == []


def test_a_wrong_width_sends_one_row_only(
    server: FakeServer, embedding_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "`prompt_embeds` hidden_size 8 does not match the model's hidden_size 64."
    server.script = [refuse(400, {"error": {"message": said}})]
    assert run(server, embedding_file) == 1
    assert "the rows are 8 wide" in capsys.readouterr().err
    assert sent_rows(server).shape == (1, 8)


def test_instruction_needs_chat(server: FakeServer, embedding_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, embedding_file, "--instruction", "x") == 1
    assert "--instruction needs --api chat" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_shell_in_another_folder(server: FakeServer, embedding_file: Path) -> None:
    command = [generation_test.__file__, "--embedding-file", "rows.npy", "--server-url", server.url]
    done = run_python(*command, cwd=embedding_file.parent)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    assert "7 prompt rows (4 from the server's prefix cache), 3 new tokens" in done.stderr
