"""Corpora that nobody would make on purpose, or only somebody who means harm: each oddity is one named problem."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.corpus.reading import UnusableTextError
from utils.corpus.source import Document, FolderSource, JsonlSource, Problem
from utils.errors import DatasetError

LIMIT = 1000


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A scan that waits fails instead."""

    def fail(*_: object) -> None:
        raise AssertionError("the scan waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.py").write_text("x = 1\n")
    return folder


def scan(root: Path, **settings: object) -> tuple[list[str], dict[str, str]]:
    """Ids of the documents, and place → reason of the problems."""
    found = list(FolderSource(str(root), max_text_bytes=LIMIT, **settings).scan())  # type: ignore[arg-type]
    problems = [x for x in found if isinstance(x, Problem)]
    assert len({x.place for x in problems}) == len(problems)
    return sorted(x.id for x in found if isinstance(x, Document)), {x.place: x.reason for x in problems}


def test_links(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key\n")
    (root / ".env").write_text("token\n")
    (root / "own").mkdir()
    (root / "own" / "index.json").write_text("{}")
    for name, target in {
        "inside.py": "good.py",
        "sub/up.py": "../good.py",
        "absolute.py": str(root / "good.py"),
        "itself": "itself",
        "sub/one": "two",
        "sub/two": "one",
        "nowhere": "missing",
        "outside": "../secret",
        "far": "/etc/hostname",
        "over": "sub/../../secret",
        "twice": "outside",
        "hidden": ".env",
        "output": "own/index.json",
        "zero": "/dev/zero",
        "folder": "/etc",
        "parent": "..",
        "sub/here": ".",
    }.items():
        (root / name).symlink_to(target)
    documents, problems = scan(root, left_out=("own",))
    assert documents == ["absolute.py", "good.py", "inside.py", "sub/up.py"]
    assert set(problems) == {
        "itself", "sub/one", "sub/two", "nowhere", "outside", "far", "over", "twice", "hidden", "output", "zero",
    }  # fmt: skip
    for name in ("outside", "far", "over", "twice", "zero"):
        assert "out of the corpus" in problems[name]
    assert ".env" in problems["hidden"]


def test_what_is_no_regular_file_is_not_opened(root: Path) -> None:
    os.mkfifo(root / "pipe.py")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.py"))
        (root / "linked.py").symlink_to("pipe.py")
        documents, problems = scan(root)
    assert documents == ["good.py"]
    assert problems == dict.fromkeys(("pipe.py", "socket.py", "linked.py"), "no regular file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and reads in spite of permissions")
def test_a_device(root: Path) -> None:
    try:
        os.mknod(root / "zero.py", 0o666 | 0o020000, os.makedev(1, 5))
    except OSError:
        pytest.skip("no devices in this container")
    assert scan(root)[1] == {"zero.py": "no regular file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(root: Path) -> None:
    (root / "locked.py").write_text("x")
    (root / "locked.py").chmod(0)
    (root / "sub").chmod(0)
    documents, problems = scan(root)
    (root / "sub").chmod(0o700)
    assert documents == ["good.py"]
    assert set(problems) == {"locked.py", "sub"}


def test_size_is_bounded_before_and_while_it_is_read(root: Path) -> None:
    (root / "exact.py").write_bytes(b"x" * LIMIT)
    (root / "more.py").write_bytes(b"x" * (LIMIT + 1))
    with (root / "sparse.py").open("wb") as stream:
        stream.truncate(100 << 30)
    documents, problems = scan(root)
    assert documents == ["exact.py", "good.py"]
    assert set(problems) == {"more.py", "sparse.py"}
    assert f"{100 << 30} bytes" in problems["sparse.py"]
    assert all(str(LIMIT) in reason and "--max-text-size" in reason for reason in problems.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="files without a size are Linux's")
def test_a_file_that_is_longer_than_it_says() -> None:
    # Files of /proc say that they have no bytes.
    source = FolderSource("/proc/self", include=("status",), max_text_bytes=100)
    (problem,) = [x for x in source.scan() if isinstance(x, Problem) and x.place == "status"]
    assert "100 bytes" in problem.reason


def test_names(root: Path) -> None:
    (root / "esc\x1b[2J\x1b]0;title\x07.bin").write_bytes(b"\0")
    (root / "line\nerror: forged").write_bytes(b"\0")
    (root / "c1\x9b31m\u202e.bin").write_bytes(b"\0")
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xff.py")).write_text("x")
    (root / ("n" * 255)).write_bytes(b"\0")
    _, problems = scan(root)
    assert len(problems) == 5
    for place, reason in problems.items():
        assert place.isprintable()
        assert reason.isprintable()
    assert any("\\x1b[2J" in place for place in problems)


def test_folders_deeper_than_a_path_may_be(root: Path) -> None:
    here = os.open(root, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=here)
            below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    documents, problems = scan(root)
    assert documents == ["good.py"]
    (reason,) = problems.values()
    assert "cannot be read" in reason


def test_what_vanishes_or_turns_into_something_else(root: Path) -> None:
    source = FolderSource(str(root))
    (document,) = [x for x in source.scan() if isinstance(x, Document)]
    file = root / "good.py"
    for change in (file.unlink, lambda: os.mkfifo(file), lambda: file.unlink() or file.mkdir()):
        change()
        with pytest.raises(UnusableTextError):
            source.read(document)


def lines(path: Path, data: bytes, limit: int = LIMIT) -> tuple[list[str], dict[str, str]]:
    path.write_bytes(data)
    source = JsonlSource(str(path), max_text_bytes=limit)
    found = list(source.scan())
    for document in (x for x in found if isinstance(x, Document)):
        assert source.read(document)
    return [x.id for x in found if isinstance(x, Document)], {
        x.place: x.reason for x in found if isinstance(x, Problem)
    }


def row(id: object, text: str = "t") -> bytes:
    return json.dumps({"id": id, "text": text}).encode()


def test_long_lines_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    fitting = row("b", "x" * (LIMIT - len(row("b", ""))))
    assert len(fitting) == LIMIT
    data = b"\n".join([row("a"), row("long", "x" * LIMIT), fitting, b" " * (3 << 20), row("c"), b'{"id": "d", "te'])
    documents, problems = lines(path, data)
    assert documents == ["a", "b", "c"]
    assert set(problems) == {"line 2", "line 4", "line 6"}
    assert all(str(LIMIT) in problems[place] for place in ("line 2", "line 4"))
    assert "not JSON" in problems["line 6"]


def test_a_line_longer_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(row("a") + b"\n")
    with path.open("r+b") as stream:
        stream.truncate(100 << 30)
        stream.seek(50 << 30)
        stream.write(b"\n" + row("b") + b"\n")
    found = list(JsonlSource(str(path), max_text_bytes=LIMIT).scan())
    assert [x.id for x in found if isinstance(x, Document)] == ["a", "b"]
    assert [x.place for x in found if isinstance(x, Problem)] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": 1, "text": "a\0b"}',
        b"\0" * 20,
        b'{"id": ' + b"9" * 5000 + b', "text": "x"}',
        b'{"id": "a\\u0000b", "text": "x"}',
        row("i" * 5000),
        row(1.5),
        row(None),
        b'{"id": NaN, "text": "x"}',
        b"{" * 5000,
        b'{"id": "a", "text": "\xed\xa0\x80"}',
        b'{"a": 1, ' + b", ".join(b'"%05d\\u001b": 0' % n for n in range(900)) + b"}",
    ],
)
def test_odd_lines_are_problems(line: bytes, tmp_path: Path) -> None:
    documents, problems = lines(tmp_path / "c.jsonl", row("good") + b"\n" + line, limit=100_000)
    assert documents == ["good"]
    assert set(problems) == {"line 2"}
    assert problems["line 2"].isprintable()
    assert len(problems["line 2"]) < 600


def test_a_jsonl_file_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "gone.jsonl").symlink_to("missing")
    for name in ("pipe", "folder", "gone"):
        with pytest.raises(DatasetError, match=f"{name}.jsonl"):
            list(JsonlSource(str(tmp_path / f"{name}.jsonl")).scan())


def test_lines_that_change_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(row("a") + b"\n" + row("b") + b"\n")
    source = JsonlSource(str(path))
    documents = [document for document in source.scan() if isinstance(document, Document)]
    for data in (b"", row("b") + b"\n" + row("a"), b"\0" * 100, row("a", "u") + b"\n" + row("b", "u")):
        path.write_bytes(data)
        for document in documents:
            with pytest.raises(UnusableTextError):
                source.read(document)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnusableTextError, match="no regular file"):
        source.read(documents[0])
