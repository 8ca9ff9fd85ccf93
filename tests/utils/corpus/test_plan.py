"""What a corpus holds, what of it is refused, and how it is cut into parcels; no model here."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from utils.corpus.plan import MAX_DOCUMENTS, CorpusPlan, FinishedDocument, parcel_documents
from utils.corpus.source import (
    Document,
    FolderSource,
    JsonlSource,
    Problem,
    UnusableTextError,
    source_from_json,
)


class Listed:
    """A source whose scan is a list."""

    ordered_by = "line"

    def __init__(self, documents: Iterator[Document]) -> None:
        self.documents = documents

    def scan(self) -> Iterator[Document]:
        return self.documents

    def read(self, document: Document) -> str:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def place(self) -> str:
        raise NotImplementedError


def listed(sizes: list[int]) -> Listed:
    return Listed(Document(id=f"d{i}", sha256=f"h{i}", text_bytes=n, line=i) for i, n in enumerate(sizes))


def cut(path: Path, sizes: list[int], finished: set[int], limit: int) -> list[list[int]]:
    """The parcels, as numbers of documents, in the order of their first."""
    with CorpusPlan.create(path) as plan:
        plan.scan(listed(sizes))
        plan.add_finished(
            FinishedDocument(id=f"d{i}", sha256=f"h{i}", shard="s", first_row=0, num_latents=1, num_tokens=1)
            for i in finished
        )
        count, text_bytes = plan.cut(limit)
        parcels = [[d.line for d in parcel_documents(path, number)] for number in range(count)]
    loads = [sum(sizes[i] for i in parcel) for parcel in parcels]
    assert loads == sorted(loads, reverse=True)
    assert sum(loads) == text_bytes
    return sorted(parcels)


@hypothesis.given(
    sizes=st.lists(st.integers(0, 12), max_size=40), finished=st.sets(st.integers(0, 39)), limit=st.integers(1, 30)
)
@hypothesis.settings(max_examples=50)
def test_parcels_hold_what_is_new_once_and_begin_where_they_would(
    sizes: list[int], finished: set[int], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.sqlite"
    done = {i for i in finished if i < len(sizes)}
    whole = cut(path, sizes, set(), limit)
    parcels = cut(path, sizes, done, limit)
    assert sorted(i for parcel in parcels for i in parcel) == [
        i for i in range(len(sizes)) if i not in done and sizes[i]
    ]
    for parcel in parcels:
        assert parcel == sorted(parcel)
        assert sum(sizes[i] for i in parcel) <= limit or len(parcel) == 1
    # A parcel of which nothing is finished is the same one: its documents are batched together again.
    for parcel in whole:
        if not done & set(parcel) and not done & set(range(parcel[0], parcel[-1])):
            assert parcel in parcels or any(sizes[i] == 0 for i in done)


def test_a_parcel_has_room_for_so_many_documents(tmp_path: Path) -> None:
    parcels = cut(tmp_path / "plan", [1] * (MAX_DOCUMENTS + 3), set(), 1 << 20)
    assert [len(parcel) for parcel in parcels] == [MAX_DOCUMENTS, 3]


def test_memory_is_flat(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        with CorpusPlan.create(tmp_path / "plan") as plan:
            plan.scan(listed([100] * count))
            plan.cut(10_000)
            assert sum(1 for _ in plan.encoded()) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # The sizes list of this test itself is 8 bytes a document.
    assert peak(20_000) < peak(2_000) + 18_000 * 8 + 200_000


def test_a_folder(tmp_path: Path) -> None:
    files = {"b.py": "x = 1\r\n", "a/z.py": "é", "a/.hidden.py": "no", ".git/c.py": "no", "a/n.txt": "text", "e.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "linked.py").symlink_to("b.py")
    (tmp_path / "loop").symlink_to(".", target_is_directory=True)
    source = FolderSource(str(tmp_path), include=("*.py",), exclude=("linked*",))
    found = {x.id: x for x in source.scan() if isinstance(x, Document)}
    assert sorted(found) == ["a/z.py", "b.py", "e.py"]
    again = source_from_json(json.loads(json.dumps(source.to_json())))
    assert {name: again.read(document) for name, document in found.items()} == {n: files[n] for n in found}
    assert {x.id for x in FolderSource(str(tmp_path)).scan() if isinstance(x, Document)} == {
        "a/n.txt", "a/z.py", "b.py", "e.py", "linked.py",
    }  # fmt: skip
    assert [x.id for x in FolderSource(str(tmp_path), include=("a/*.py",)).scan()] == ["a/z.py"]
    (tmp_path / "b.py").write_text("x = 2\r\n")
    with pytest.raises(UnusableTextError, match="changed since"):
        source.read(found["b.py"])


def test_what_a_folder_cannot_give(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "marked").write_text("a <|memory|> b")
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (Path(os.fsencode(tmp_path).decode()) / os.fsdecode(b"\xff.py")).write_text("x")
    problems = {x.place: x.reason for x in FolderSource(str(tmp_path)).scan() if isinstance(x, Problem)}
    assert problems == {
        "binary": "binary (it holds a zero byte)",
        "latin": "not UTF-8 text (byte 3)",
        "marked": "holds the marker <|memory|>, which a memory cannot",
        "broken": "cannot be read (No such file or directory)",
        "pipe": "no regular file",
        repr("\udcff.py"): "its name is not UTF-8",
    }


def test_lines_and_what_they_cannot_give(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    lines = [
        b'{"id": "a", "text": "one\\r\\n"}',
        b"",
        b'{"id": 7, "text": "two"}',
        b'{"id": "b", "text": ',
        b"[1]",
        b'{"id": "c"}',
        b'{"id": "d", "text": 5}',
        b'{"text": "x"}',
        b'{"id": true, "text": "x"}',
        b'{"id": "e", "text": "\\ud800"}',
        b'{"id": "f", "text": "\xff"}',
        b'{"id": "a", "text": "again"}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines))
    source = JsonlSource(str(path))
    with CorpusPlan.create(tmp_path / "plan") as plan:
        plan.scan(source)
        assert [(d.id, source.read(d)) for d, _ in plan.encoded()] == [("a", "one\r\n"), ("7", "two")]
        assert plan.num_duplicates == 1
        problems = [str(problem) for problem in plan.problems()]
    assert problems == [
        "line 4: not JSON: Expecting value (column 21)",
        "line 5: expected a JSON object, got list",
        "line 6: no key 'text', it has 'id': name it with --text-field",
        "line 7: 'text' must be a text, got int",
        "line 8: no key 'id', it has 'text': name it with --id-field or --line-ids",
        "line 9: 'id' must be a text or whole number, got bool",
        "line 10: the text holds half a character (a lone surrogate)",
        "line 11: not UTF-8 (byte 21)",
        "line 12: its id 'a' is line 1's already",
        "line 13: not JSON: nested too deeply",
    ]
    numbered = [x for x in JsonlSource(str(path), id_field=None).scan() if isinstance(x, Document)]
    assert [x.id for x in numbered] == ["1", "3", "8", "9", "12"]
    path.write_bytes(b'{"id": "zz", "text": "moved"}\n' + path.read_bytes())
    with pytest.raises(UnusableTextError):
        source.read(Document(id="7", sha256="", text_bytes=3, offset=len(lines[0]) + 2, size=len(lines[2]), line=3))
