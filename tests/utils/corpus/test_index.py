"""What a corpus holds, what of it is refused, and how it is cut into shards; no model here."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from utils.corpus.index import MAX_DOCUMENTS, cut, new_index
from utils.corpus.source import Document, FolderSource, JsonlSource, Problem, UnusableTextError


def documents(sizes: Iterable[int]) -> Iterator[Document]:
    return (Document(id=f"d{i}", sha256=f"h{i}", text_bytes=n, line=i) for i, n in enumerate(sizes))


def shards(sizes: list[int], stored: set[int], limit: int) -> list[list[int]]:
    """The missing shards, as numbers of documents."""
    found = cut(((document, document.line in stored) for document in documents(sizes)), limit)
    return [[document.line for document in shard] for shard in found]


@hypothesis.given(
    sizes=st.lists(st.integers(1, 12), max_size=40), stored=st.sets(st.integers(0, 39)), limit=st.integers(1, 30)
)
@hypothesis.settings(max_examples=50)
def test_shards_hold_what_is_missing_once_and_begin_where_they_would(
    sizes: list[int], stored: set[int], limit: int
) -> None:
    missing = shards(sizes, stored, limit)
    assert sorted(i for shard in missing for i in shard) == [i for i in range(len(sizes)) if i not in stored]
    for shard in missing:
        assert shard == sorted(shard)
        assert sum(sizes[i] for i in shard) <= limit or len(shard) == 1
    # A shard of which nothing is stored is the same one: its documents are batched together again.
    assert all(shard in missing for shard in shards(sizes, set(), limit) if not stored & set(shard))


def test_a_shard_has_room_for_so_many_documents() -> None:
    assert [len(shard) for shard in shards([1] * (MAX_DOCUMENTS + 3), set(), 1 << 20)] == [MAX_DOCUMENTS, 3]


def test_memory_is_flat(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        path.write_text('{"text": "x"}\n' * count)
        tracemalloc.start()
        with new_index(JsonlSource(str(path), id_field=None)) as index:
            index.scan()
            assert sum(len(shard) for shard in index.missing_shards(100)) == count
            index.write(tmp_path / "index.sqlite", 4)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(4_000)  # Python keeps up to 2,000 freed tuples of each size: they are no growth
    # A list of so many documents would take 1.5 MB.
    assert peak(4_000) < peak(400) + 200_000


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
    again = pickle.loads(pickle.dumps(source))
    assert {name: again.read(document) for name, document in found.items()} == {n: files[n] for n in found}
    assert {x.id for x in FolderSource(str(tmp_path)).scan() if isinstance(x, Document)} == {
        "a/n.txt", "a/z.py", "b.py", "e.py", "linked.py",
    }  # fmt: skip
    assert [x.id for x in FolderSource(str(tmp_path), include=("a/*.py",)).scan()] == ["a/z.py"]
    (tmp_path / "b.py").write_text("x = 2\r\n")
    with pytest.raises(UnusableTextError, match="changed since"):
        source.read(found["b.py"])


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-8"):
        (tmp_path / encoding).write_bytes("é\r\n".encode(encoding))
    source = FolderSource(str(tmp_path))
    found = [document for document in source.scan() if isinstance(document, Document)]
    assert [source.read(document) for document in found] == ["é\r\n"] * 3
    path = tmp_path / "corpus.jsonl"
    path.write_bytes('{"id": "a", "text": "é"}\n{"id": "b", "text": "x"}\n'.encode("utf-8-sig"))
    lines = JsonlSource(str(path))
    assert [(document.id, lines.read(document)) for document in lines.scan()] == [("a", "é"), ("b", "x")]


def test_what_a_folder_cannot_give(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (Path(os.fsencode(tmp_path).decode()) / os.fsdecode(b"\xff.py")).write_text("x")
    problems = {x.place: x.reason for x in FolderSource(str(tmp_path)).scan() if isinstance(x, Problem)}
    assert problems == {
        "binary": "binary (it holds a zero byte)",
        "latin": "not UTF-8 text (byte 3)",
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
    with new_index(source) as index:
        index.scan()
        (shard,) = index.missing_shards(100)
        assert [(document.id, source.read(document)) for document in shard] == [("a", "one\r\n"), ("7", "two")]
        assert index.num_duplicates == 1
        problems = [str(problem) for problem in index.problems()]
    assert problems == [
        "line 4: not JSON: Expecting value: line 1 column 21 (char 20)",
        "line 5: expected a JSON object, got list",
        "line 6: no key 'text', it has 'id': name it with --text-field",
        "line 7: 'text' must be a text, got int",
        "line 8: no key 'id', it has 'text': name it with --id-field or --line-ids",
        "line 9: 'id' must be a text or whole number, got bool",
        "line 10: its text or id holds half a character (a lone surrogate)",
        "line 11: not UTF-8 (byte 21)",
        "line 12: its id 'a' is line 1's already",
        "line 13: not JSON that can be read: nested too deeply",
    ]
    numbered = [x for x in JsonlSource(str(path), id_field=None).scan() if isinstance(x, Document)]
    assert [x.id for x in numbered] == ["1", "3", "8", "9", "12"]
    path.write_bytes(b'{"id": "zz", "text": "moved"}\n' + path.read_bytes())
    with pytest.raises(UnusableTextError):
        source.read(Document(id="7", sha256="", text_bytes=3, offset=len(lines[0]) + 2, size=len(lines[2]), line=3))
