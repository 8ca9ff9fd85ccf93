"""A corpus encoded by Ray, and through kills: the same bytes as one process in one go writes."""

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
from utils.files import PROJECT_ROOT

pytestmark = pytest.mark.slow
MODULE = "utils.corpus.__main__"


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "ctrl-c"])
def test_an_ended_run_leaves_shards_only(number: int, code: int, flags: list[str], tmp_path: Path) -> None:
    for name in ("tmp", "out"):
        (tmp_path / name).mkdir()
    process = start_python("-m", MODULE, *flags, "--output", str(tmp_path / "out"), TMPDIR=str(tmp_path / "tmp"))
    while process.poll() is None and not shards(tmp_path / "out"):
        time.sleep(0.001)
    os.killpg(process.pid, number)
    _, err = process.communicate()
    assert "Traceback" not in err
    assert process.returncode == code
    left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("latents-")}
    assert left <= {".lock", "corpus.json"}
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
    assert "needs Ray, which is not installed: run `uv sync --extra ray`" in err.getvalue()


def test_two_workers_are_nearly_twice_as_fast(default_checkpoint: Path, tmp_path: Path) -> None:
    """Tokens a second of two Ray workers beside one, a thread each: `pytest -m slow -k twice_as_fast -s`."""
    pytest.importorskip("ray.data", reason="Ray is not installed: uv sync --extra ray")
    cores = len(os.sched_getaffinity(0))
    if cores < 2 or os.getloadavg()[0] > 0.5:
        pytest.skip(f"needs two idle cores; {cores} cores, load {os.getloadavg()[0]:.1f}")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))[:40]
    (tmp_path / "corpus").mkdir()
    for path in sources:
        (tmp_path / "corpus" / path.name).write_text(path.read_text(encoding="utf-8"))
    flags = [str(tmp_path / "corpus"), "--checkpoint", str(default_checkpoint), "--chunk-size", "8", "--device", "cpu"]
    flags += ["--shard-size", "32K", "--threads", "1", "--json"]
    one, two = (
        finished(start_python("-m", MODULE, *flags, "--output", str(tmp_path / count), "--workers", count))
        for count in ("1", "2")
    )
    ratio = two["tokens_per_second"] / one["tokens_per_second"]
    print(json.dumps({"one": one["tokens_per_second"], "two": two["tokens_per_second"], "ratio": round(ratio, 3)}))
    assert ratio >= 1.7
