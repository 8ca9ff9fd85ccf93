"""Prediction runs: every row is answered, whatever the server and the machine do."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ruler.__main__ import main
from ruler.answering.predict import PredictJob, predict
from ruler.answering.predictions import DataRow, PredictionFile, prediction_row, read_predictions
from ruler.answering.protocol import BackendSettings
from tests.support import fake_server
from tests.support.fake_server import FAULTS, answer_to, by_prompt, faulty, prompt_of, refuse, running
from utils.client.completion import RetryPolicy
from utils.errors import ConfigError, DatasetError, ServerError

FAST = RetryPolicy(attempts=30, first_wait_s=0.001, longest_wait_s=0.02)
REFUSAL = {"error": {"message": "this server says no"}}


def settings(server, **changes):
    values = {"name": "server-text", "server_url": server.url, "model": "tiny", "concurrency": 4, "timeout_s": 5.0}
    return BackendSettings(**{**values, **changes})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def job(make_dataset, tmp_path):
    return PredictJob(data_dir=make_dataset(), output_dir=tmp_path / "run")


def test_answers_in_dataset_order_in_the_reference_format(job):
    with running(by_prompt) as server:
        outcomes = predict(job, settings(server))
    assert [(o.length, o.task, o.rows, o.answered, o.failed) for o in outcomes] == [(1024, "niah_single_1", 6, 6, 0)]
    rows = read(job.output_dir / "1024/niah_single_1.jsonl")
    assert [row["index"] for row in rows] == list(range(6))
    data = read(job.data_dir / "1024/niah_single_1/validation.jsonl")
    for row, question in zip(rows, data, strict=True):
        prompt = question["input"] + question["answer_prefix"]
        assert row["pred"] == answer_to(prompt)
        assert row["outputs"] == question["outputs"]
        assert {"truncation", "length", "others"} <= row.keys()
        assert row["others"]["prompt_tokens"] == len(prompt.split())
        start, end = question["context_start"], question["context_end"]
        wanted = (question["input"].index(" is: ") - start) / (end - start)
        assert row["others"]["depths"] == [pytest.approx(wanted, abs=1e-4)]


def test_chat_sends_one_user_turn_and_sampling_travels(job):
    with running(by_prompt) as server:
        predict(job, settings(server, api="chat", model=None))
    body = server.bodies[0]
    assert body["messages"][0]["role"] == "user"
    assert body["model"] == "tiny"  # the only one served
    assert body["max_tokens"] == 128
    assert body["temperature"] == 0
    assert "top_k" not in body


def test_concurrency_is_bounded(make_dataset, tmp_path):
    job = PredictJob(data_dir=make_dataset(count=20), output_dir=tmp_path / "run")
    in_flight, counts = set(), []

    def slow(handler):
        in_flight.add(handler)
        counts.append(len(in_flight))
        time.sleep(0.03)
        in_flight.discard(handler)
        by_prompt(handler)

    with running(slow) as server:
        predict(job, settings(server, concurrency=3))
    assert 2 <= max(counts) <= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_server_costs_retries_never_rows(make_dataset, tmp_path, fault):
    job = PredictJob(data_dir=make_dataset(count=12), output_dir=tmp_path / "run")
    with running(faulty(fault)) as server:
        outcomes = predict(job, settings(server, timeout_s=0.15 if fault in ("hang", "drip") else 5.0), FAST)
    assert outcomes[0].answered == 12
    assert len(server.prompts) > 12
    rows = read(job.output_dir / "1024/niah_single_1.jsonl")
    assert all(row["pred"] in {answer_to(prompt) for prompt in server.prompts} for row in rows)
    assert len({row["pred"] for row in rows}) == 12


def test_failed_rows_are_listed_and_asked_again(job, make_dataset, capsys):
    flags = ["--data-dir", str(job.data_dir), "--output-dir", str(job.output_dir), "--backend", "server-text"]

    def refuse_k3(handler):
        (refuse(400, REFUSAL) if "k3 is:" in prompt_of(handler.asked) else by_prompt)(handler)

    with running(refuse_k3) as server:
        code = main(["predict", *flags, "--server-url", server.url, "--model", "tiny"])
    assert code == 3
    assert capsys.readouterr().out.splitlines()[1].split() == ["1024", "niah_single_1", "6", "5", "1"]
    folder = job.output_dir / "1024"
    failures = read(folder / "niah_single_1.failed.jsonl")
    assert [failure["row"] for failure in failures] == [3]
    assert "this server says no" in failures[0]["error"]
    with running(by_prompt) as server:
        code = main(["predict", *flags, "--server-url", server.url, "--model", "tiny", "--json"])
    assert code == 0
    assert len(server.prompts) == 1
    assert not (folder / "niah_single_1.failed.jsonl").exists()
    assert [row["index"] for row in read(folder / "niah_single_1.jsonl")] == list(range(6))
    assert json.loads(capsys.readouterr().out)["tasks"][0]["answered"] == 1


@pytest.mark.parametrize(("status", "words"), [(401, "answered 401"), (404, "this server says no")])
def test_a_refusing_server_stops_the_run_with_its_own_words(job, status, words):
    with running(refuse(status, REFUSAL)) as server, pytest.raises(ServerError, match=words):
        predict(job, settings(server), FAST)
    assert len(server.prompts) <= 4  # in flight


def test_no_server_is_said_at_once(job):
    with running(by_prompt) as server:
        gone = settings(server)
    started = time.monotonic()
    with pytest.raises(ServerError, match="start the server"):
        predict(job, gone)
    assert time.monotonic() - started < 5


def test_a_server_that_fails_for_good_stops_the_run_and_keeps_what_it_has(make_dataset, tmp_path):
    job = PredictJob(data_dir=make_dataset(count=40), output_dir=tmp_path / "run")
    with running(by_prompt) as server:
        predict(PredictJob(data_dir=job.data_dir, output_dir=job.output_dir, max_rows=5), settings(server))
    short = RetryPolicy(attempts=2, first_wait_s=0.001)
    with running(refuse(503, REFUSAL)) as server, pytest.raises(ServerError, match="rows failed one after the other"):
        predict(job, settings(server), short)
    assert len(read(job.output_dir / "1024/niah_single_1.jsonl")) == 5


def test_a_half_written_line_is_cut_off_and_its_row_asked_again(job, caplog):
    with running(by_prompt) as server:
        predict(job, settings(server))
        path = job.output_dir / "1024/niah_single_1.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        server.requests.clear()
        with caplog.at_level(logging.WARNING, logger="ruler"):
            predict(job, settings(server))
    assert "half-written" in caplog.text
    assert len(server.prompts) == 1
    assert path.read_bytes() == whole


def test_a_finished_run_needs_no_server(job):
    with running(by_prompt) as server:
        predict(job, settings(server))
    assert predict(job, settings(server))[0].answered == 0


def test_a_broken_line_in_the_middle_is_named(job):
    with running(by_prompt) as server:
        predict(job, settings(server))
        path = job.output_dir / "1024/niah_single_1.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], b'{"index": 1, "pr\n', *lines[2:]]))
        with pytest.raises(DatasetError, match="line 2: not JSON"):
            predict(job, settings(server))


def test_another_dataset_is_refused(job, make_dataset):
    with running(by_prompt) as server:
        predict(job, settings(server))
        make_dataset(salt=" of another kind")
        with pytest.raises(DatasetError, match="another dataset"):
            predict(job, settings(server))


def test_a_longer_dataset_goes_on_where_the_shorter_ended(job, make_dataset):
    with running(by_prompt) as server:
        predict(job, settings(server))
        make_dataset(count=9)
        assert predict(job, settings(server))[0].answered == 3


def test_other_settings_are_refused_and_named(job):
    with running(by_prompt) as server:
        predict(job, settings(server))
        with pytest.raises(DatasetError, match=r"model = 'tiny', this run has 'other'"):
            predict(job, settings(server, model="other"))


def test_two_runs_do_not_write_one_file(job):
    with running(by_prompt) as server, ThreadPoolExecutor() as other_run:
        predict(job, settings(server))
        path = job.output_dir / "1024/niah_single_1.jsonl"
        with PredictionFile(path, _rows(job)), pytest.raises(ConfigError, match="another run"):
            other_run.submit(predict, job, settings(server)).result()


def _rows(job):
    data = read(job.data_dir / "1024/niah_single_1/validation.jsonl")
    return [DataRow(number=number, fields=row) for number, row in enumerate(data)]


def test_text_that_is_no_utf8_survives(job):
    rows = _rows(job)
    path = job.output_dir / "x.jsonl"
    with PredictionFile(path, rows) as file:
        file.append(prediction_row(rows[0], "half \ud83d a pair\x00\r\n", {}))
    assert next(read_predictions(path))["pred"] == "half \ud83d a pair\x00\r\n"


def test_tasks_and_lengths_are_chosen(make_dataset, tmp_path, capsys):
    data = make_dataset(tasks=("niah_single_1", "vt"), lengths=(1024, 2048), count=2)
    flags = ["predict", "--data-dir", str(data), "--output-dir", str(tmp_path / "run"), "--backend", "server-text"]
    with running(by_prompt) as server:
        chosen = ["--tasks", "vt", "--lengths", "2k", "--server-url", server.url]
        assert main([*flags, *chosen]) == 0
        assert len(server.prompts) == 2
    assert [path.name for path in (tmp_path / "run").rglob("*.jsonl")] == ["vt.jsonl"]
    assert main([*flags, "--lengths", "4k"]) == 1
    assert "has no length 4096; it has 1024, 2048" in capsys.readouterr().err
    assert main([*flags, "--tasks", "cwe"]) == 1
    assert "has no rows of cwe; it has niah_single_1, vt" in capsys.readouterr().err


def test_missing_data_and_unknown_tasks(tmp_path, capsys):
    flags = ["predict", "--data-dir", str(tmp_path / "none"), "--output-dir", str(tmp_path / "run")]
    assert main(flags) == 1
    assert "none is not a folder" in capsys.readouterr().err
    assert main([*flags, "--tasks", "niah_single_9"]) == 1
    assert "unknown task 'niah_single_9'" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_sigkills_end_with_the_same_rows(make_dataset, tmp_path):
    data = make_dataset(tasks=("niah_single_1", "vt"), lengths=(1024, 2048), count=100)
    server = subprocess.Popen([sys.executable, fake_server.__file__], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()

    def start(output):
        flags = ["--backend", "server-text", "--server-url", url, "--model", "tiny", "--concurrency", "4"]
        command = ["-m", "ruler", "predict", "--data-dir", str(data), "--output-dir", str(output), *flags]
        return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    rng, kills = random.Random(7), 0
    try:
        assert start(tmp_path / "whole").wait(timeout=300) == 0
        while kills < 10:
            process = start(tmp_path / "killed")
            # Aim into the working phase: imports take about a second.
            time.sleep(rng.uniform(0.8, 2.2))
            kills += process.poll() is None
            process.kill()
            process.wait()
        assert start(tmp_path / "killed").wait(timeout=300) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    for path in (tmp_path / "whole").rglob("*.jsonl"):
        other = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()
        assert len(path.read_bytes().splitlines()) == 100
