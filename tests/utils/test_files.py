"""Files and folders appear whole or not at all; readers say where a file is wrong."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import DatasetError
from utils.files import (
    PROJECT_ROOT,
    atomic_folder,
    atomic_path,
    git_commit,
    provenance,
    read_json,
    read_jsonl,
    sha256_bytes,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_a_file_replaces_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "made" / "file.txt"
    write_text(target, "old\r\n")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        write_half(temporary)
    assert target.read_bytes() == b"old\r\n"
    write_text(target, "new")
    assert (target.read_text(), names(target.parent)) == ("new", ["file.txt"])
    (tmp_path / "ordinary").write_text("x")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_a_folder_replaces_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        write_half(temporary / "b")
    assert (names(tmp_path), names(target)) == (["folder"], ["a"])
    with atomic_folder(target) as temporary:
        (temporary / "b").write_text("2")
    assert (names(tmp_path), names(target)) == (["folder"], ["b"])


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "precious").write_text("x")
    rename = Path.rename

    def fail_for_the_new(self: Path, to: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), atomic_folder(target) as temporary:
        (temporary / "new").write_text("y")
    assert (names(tmp_path), names(target)) == (["folder"], ["precious"])


@settings(max_examples=20)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.none()), max_size=4)))
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert write_jsonl(path, iter(rows)) == len(rows)
    assert list(read_jsonl(path)) == rows


def test_readers_name_file_and_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(DatasetError, match=r"x\.json does not exist"):
        read_json(path)
    with pytest.raises(DatasetError, match=r"x\.json does not exist"):
        next(read_jsonl(path))
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(DatasetError, match=r"x\.json, line 3: expected a JSON object, got list"):
        list(read_jsonl(path))
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(DatasetError, match=r"x\.json, line 2: not JSON"):
        list(read_jsonl(path))
    with pytest.raises(DatasetError, match=r"x\.json is not JSON"):
        read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(DatasetError, match=r"x\.json is not UTF-8 text \(byte 1\)"):
        read_json(path)
    with pytest.raises(DatasetError, match=r"x\.json is not UTF-8 text"):
        list(read_jsonl(path))


def test_fingerprints_and_provenance(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1]})
    assert sha256_file(tmp_path / "a.json") == sha256_bytes((tmp_path / "a.json").read_bytes())
    facts = provenance()
    assert {"code_llava", "commit", "python", "machine", "torch", "transformers", "numpy"} == facts.keys()
    assert facts["commit"] == git_commit()


def test_a_project_that_is_not_installed_says_so(tmp_path: Path) -> None:
    """Run from its folder, as where no package can be added: results are made all the same."""
    code = (
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "def version(name):\n"
        "    if name == 'code-llava':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
        "from utils.files import provenance\n"
        "print(provenance()['code_llava'], provenance(['no-such-package']).get('no-such-package'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "not installed None\n", done.stderr
