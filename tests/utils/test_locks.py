"""One writer a folder: who is refused, what is removed, and what is nobody's business."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from tests.support.processes import start_python
from utils.errors import ConfigError
from utils.files import atomic_folder, atomic_path
from utils.locks import remove_leftovers, sole_writer

HOLD = (
    "import sys; from utils.locks import sole_writer\nwith sole_writer(sys.argv[1]): print('held', flush=True); input()"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes the folder."""
    process = start_python("-c", HOLD, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{tmp_path} .*{other.pid}"), sole_writer(tmp_path):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with sole_writer(tmp_path) as held:
        assert held


def test_one_process_may_nest_it(tmp_path: Path) -> None:
    with sole_writer(tmp_path), sole_writer(tmp_path) as held:
        assert held
    with sole_writer(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(tmp_path) as held:
        assert not held
    assert str(tmp_path) in caplog.text


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), sole_writer(tmp_path / "file" / "folder"):
        pass


def test_leftovers_of_the_names_asked_for_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step_1").mkdir()
    kept = [".other.abcd1234.tmp", ".step_3.tmp", "step_4.abcd1234.tmp", ".step_2", ".a.json.abcd1234.bak"]
    for name in (".step_1.abcd1234.tmp", ".step_1.abcd1234.old", ".step_7.abcd1234.old", *kept[:4]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text(name)
    for name in (".a.json.abcd_234.tmp", kept[4]):
        (tmp_path / name).write_text("")
    (tmp_path / ".step_1.linked12.tmp").symlink_to(tmp_path / "step_1")
    remove_leftovers(tmp_path, "step_*", "a.json")
    left = {path.name for path in tmp_path.iterdir()}
    # What had been put aside for something that never came is back in its place.
    assert left == {*kept, "step_1", "step_7", ".step_1.linked12.tmp"}
    assert (tmp_path / "step_7" / "data").is_file()
    remove_leftovers(tmp_path / "nowhere", "*")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_leaves_is_found(kind: str, tmp_path: Path) -> None:
    manager = atomic_path if kind == "file" else atomic_folder
    left = {path.name for path in tmp_path.iterdir()}
    writer = manager(tmp_path / "result.json")
    writer.__enter__()
    assert {path.name for path in tmp_path.iterdir()} > left
    remove_leftovers(tmp_path, "result.json")
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_lock_of_somebody_elses_program(tmp_path: Path) -> None:
    (tmp_path / ".lock.pid").write_text("\x1b[2J")
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(ConfigError) as caught, sole_writer(tmp_path):
        pass
    assert str(caught.value).isprintable()
