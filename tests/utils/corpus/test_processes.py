"""A corpus encoded by several processes, by Ray, and through kills: the same bytes as one process in one go writes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import start_python
from utils.corpus import __main__ as encode_corpus
from utils.corpus.reader import EncodedCorpus
from utils.files import PROJECT_ROOT

pytestmark = pytest.mark.slow
MODULE = "utils.corpus.__main__"
LAUNCH = ["-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2", "--main-process-port", "0", "-m"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small files and a larger one, real source code."""
    folder = tmp_path_factory.mktemp("corpus")
    text = (PROJECT_ROOT / "utils" / "files.py").read_text(encoding="utf-8")
    for number in range(10):
        (folder / f"{number}.py").write_text(text[number * 300 : number * 300 + 150 + 40 * number])
    (folder / "large.py").write_text(text[:2000])
    return folder


@pytest.fixture(scope="module")
def flags(corpus: Path, checkpoints: dict[str, Path]) -> list[str]:
    return [str(corpus), "--checkpoint", str(checkpoints["lclm"]), "--device", "cpu", "--shard-size", "500", "--json"]


@pytest.fixture(scope="module")
def expected(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Shards and summary of one process in one go."""
    out = tmp_path_factory.mktemp("alone")
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert encode_corpus.main([*flags, "--output", str(out)]) == 0
    return shards(out), json.loads(text.getvalue())


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("latents-*")}


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    assert out.count("\n") == 1, out
    return json.loads(out)


def test_two_processes_write_what_one_does(flags: list[str], expected: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    summary = finished(start_python(*LAUNCH, MODULE, *flags, "--output", out, "--threads", "1"))
    assert summary["processes"] == 2
    for name in ("documents", "encoded_documents", "encoded_tokens", "num_latents", "shards", "corpus_sha256"):
        assert summary[name] == expected[1][name], name
    assert shards(tmp_path / "out") == expected[0]
    with EncodedCorpus.open(out) as encoded:
        assert len(encoded) == 11


def test_bad_input_ends_all_processes(flags: list[str], corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "binary").write_bytes(b"\0")
    process = start_python(*LAUNCH, MODULE, str(bad), *flags[1:], "--output", str(tmp_path / "out"))
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert out == ""
    assert "error: 1 documents cannot be encoded:\n  binary: binary" in err


def test_sigkill_loses_and_repeats_nothing(flags: list[str], expected: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["-m", MODULE, *flags, "--output", str(out)]
    kills = 0
    for wanted in (1, 3):
        process = start_python(*command)
        while process.poll() is None and len(list(out.glob("latents-*"))) < wanted:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert shards(out).items() <= expected[0].items()
    assert kills >= 1
    left = len(shards(out))
    summary = finished(start_python(*command))
    assert shards(out) == expected[0]
    assert summary["num_latents"] == expected[1]["num_latents"]
    if left < len(expected[0]):
        assert 0 < summary["encoded_documents"] < summary["documents"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "term", "ctrl-c"])
def test_an_ended_run_leaves_no_plan(number: int, flags: list[str], tmp_path: Path) -> None:
    for name in ("tmp", "cache"):
        (tmp_path / name).mkdir()
    command = ["-m", MODULE, *flags, "--to-cache", "--cache-dir", str(tmp_path / "cache")]

    def plans() -> list[Path]:
        return list(tmp_path.rglob(".plan.sqlite"))

    process = start_python(*command, TMPDIR=str(tmp_path / "tmp"))
    while process.poll() is None and not plans():
        time.sleep(0.001)
    os.killpg(process.pid, number)
    _, err = process.communicate()
    assert "Traceback" not in err
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    if number != signal.SIGKILL:
        assert plans() == []
    finished(start_python(*command, TMPDIR=str(tmp_path / "tmp")))
    assert plans() == []
    assert list((tmp_path / "tmp").iterdir()) == []


def with_ray(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command with two Ray workers; skips where Ray cannot run."""
    pytest.importorskip("ray.data", reason="Ray is not installed: uv sync --extra ray")
    # Ray makes its workers nice, and a busy machine then leaves them nothing.
    process = start_python(
        "-m", MODULE, *arguments, "--engine", "ray", "--workers", "2", "--threads", "1", RAY_worker_niceness="0"
    )
    out, err = process.communicate(timeout=500)
    if "error: Ray cannot start on this machine" in err:
        pytest.skip(err.splitlines()[-1])
    return process.returncode, out, err


def test_ray_writes_what_one_process_does(flags: list[str], expected: Any, tmp_path: Path) -> None:
    code, out, err = with_ray(*flags, "--output", str(tmp_path / "out"))
    assert code == 0, err[-3000:]
    assert json.loads(out)["encoded_documents"] == expected[1]["encoded_documents"]
    assert shards(tmp_path / "out") == expected[0]


def test_an_error_in_a_ray_worker_arrives_as_ours(flags: list[str]) -> None:
    code, out, err = with_ray(*flags, "--to-cache", "--cache-dir", "/proc/no")
    assert (code, out) == (1, "")
    assert "error: the latent cache /proc/no cannot be used" in err
    assert "Traceback" not in err


def test_ray_that_is_not_there_is_named(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert encode_corpus.main([*flags, "--output", str(tmp_path / "out"), "--engine", "ray"]) == 1
    assert "error: --engine ray needs Ray, which is not installed: run `uv sync --extra ray`" in err.getvalue()


def test_two_processes_are_nearly_twice_as_fast(default_checkpoint: Path, tmp_path: Path) -> None:
    """Tokens a second of two processes beside one, a thread each: `pytest -m slow -k twice_as_fast -s`."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2 or os.getloadavg()[0] > 0.5:
        pytest.skip(f"needs two idle cores; {cores} cores, load {os.getloadavg()[0]:.1f}")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:40]
    (tmp_path / "corpus").mkdir()
    for path in sources:
        (tmp_path / "corpus" / path.name).write_text(path.read_text(encoding="utf-8"))
    flags = [str(tmp_path / "corpus"), "--checkpoint", str(default_checkpoint), "--chunk-size", "8", "--device", "cpu"]
    flags += ["--shard-size", "32K", "--threads", "1", "--json", "--output"]
    one = finished(start_python("-m", MODULE, *flags, str(tmp_path / "one")))
    two = finished(start_python(*LAUNCH, MODULE, *flags, str(tmp_path / "two")))
    ratio = two["tokens_per_second"] / one["tokens_per_second"]
    print(json.dumps({"one": one["tokens_per_second"], "two": two["tokens_per_second"], "ratio": round(ratio, 3)}))
    assert ratio >= 1.7
