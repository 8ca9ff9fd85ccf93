"""Files and folders appear whole or not at all; readers say where a file is wrong."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.processes import run_python
from utils.errors import ConfigError, DatasetError
from utils.files import (
    atomic_folder,
    atomic_path,
    decode_text,
    git_commit,
    provenance,
    read_json,
    read_jsonl,
    refuse_overwriting_inputs,
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


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    kept = [".file.abcd1234.bak", ".other.abcd1234.tmp", ".file.ABCD.tmp"]
    for name in (".file.abcd1234.tmp", *kept):
        (tmp_path / name).touch()
    (tmp_path / ".file.linked12.tmp").symlink_to(".other.abcd1234.tmp")
    write_text(tmp_path / "file", "x")
    assert names(tmp_path) == sorted([*kept, ".file.linked12.tmp", "file"])
    # A folder may have been put aside for a new one that did not come.
    for name in (".folder.abcd1234.tmp", ".folder.abcd1234.old"):
        (tmp_path / "two" / name).mkdir(parents=True)
        (tmp_path / "two" / name / "content").write_text(name)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "two" / "folder") as temporary:
        write_half(temporary / "b")
    assert names(tmp_path / "two") == ["folder"]
    assert (tmp_path / "two" / "folder" / "content").read_text() == ".folder.abcd1234.old"


def test_what_others_are_writing_is_left_alone(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as one, atomic_path(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
        write_text(tmp_path / "file", "third")
        assert (one.read_text(), other.read_text()) == ("one", "other")
    assert (names(tmp_path), (tmp_path / "file").read_text()) == (["file"], "one")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_text(tmp_path / "file", str(number)), range(200)))
    assert names(tmp_path) == ["file"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    real, link, further = tmp_path / "real", tmp_path / "link", tmp_path / "further"
    link.symlink_to("real/made/file")  # to nothing yet, in a folder that is not there either
    further.symlink_to(link)
    for text in ("one", "two"):
        write_text(further, text)
        assert (link.is_symlink(), further.is_symlink()) == (True, True)
        assert (real / "made" / "file").read_text() == text
    assert names(real / "made") == ["file"]
    (tmp_path / "folder_link").symlink_to(tmp_path / "folder")
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "folder_link") as temporary:
            (temporary / name).touch()
        assert (tmp_path / "folder_link").is_symlink()
        assert names(tmp_path / "folder") == [name]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    for mode in (0o600, 0o664, 0o755):
        (tmp_path / "file").touch()
        (tmp_path / "file").chmod(mode)
        write_text(tmp_path / "file", "new")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o700)
    with atomic_folder(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_ring(path: Path) -> None:
    path.symlink_to(path.name)


def make_read_only(path: Path) -> None:
    path.write_text("x")
    path.chmod(0o444)


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("x")


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "socket": make_socket,
    "ring": make_ring,
    "read-only": make_read_only,
    "pipe without a reader": lambda path: os.mkfifo(path),
    "parent": below_a_file,
}


@pytest.mark.parametrize("kind", list(IN_THE_WAY))
def test_what_is_in_a_files_way_stays(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("sub") / "out"
    path.parent.mkdir()
    IN_THE_WAY[kind](path)
    before = [(found, found.lstat()) for found in sorted(tmp_path.rglob("*"))]
    with pytest.raises(OSError) as caught:  # noqa: PT011
        write_text(path, "new")
    assert caught.value.strerror
    assert Path(caught.value.filename) in (path, path.parent)
    assert [(found, found.lstat()) for found in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_folder_is_no_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError):
        write_text(name, "new")


@pytest.mark.parametrize("kind", ["file", "socket", "ring", "pipe", "read-only"])
def test_what_is_in_a_folders_way_stays(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("out")
    if kind == "read-only":
        path.mkdir()
        path.chmod(0o555)
    else:
        {"file": Path.touch, "socket": make_socket, "ring": make_ring, "pipe": os.mkfifo}[kind](path)
    before = path.lstat()
    with pytest.raises(OSError), atomic_folder(path):  # noqa: PT011
        pytest.fail("the work began")
    assert (path.lstat(), names(tmp_path)) == (before, ["out"])


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe", "x" * 300_000
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    got = bytearray()

    def read() -> None:
        while block := os.read(handle, 5000):
            got.extend(block)
        os.close(handle)

    with atomic_path(pipe) as temporary:
        temporary.write_text(content)
        reader = threading.Thread(target=read)  # now that there is a writer to wait for
        reader.start()
    reader.join()
    assert got.decode() == content
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_a_reader_that_leaves_is_an_error_of_the_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="pipe") as caught, atomic_path(tmp_path / "pipe") as temporary:  # noqa: PT012
        temporary.write_bytes(b"x" * 300_000)
        os.close(reader)
    assert not isinstance(caught.value, BrokenPipeError)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_is_written_into(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("no device nodes here")
    before = device.stat()
    write_text(device, "x")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert device.stat().st_ino == before.st_ino
    assert names(tmp_path) == ["null"]
    os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(240, 3))
    with pytest.raises(OSError, match="no file"):
        write_text(tmp_path / "disk", "x")


def test_a_long_name_has_a_temporary_one_too(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    with pytest.raises(OSError, match="too long"):
        write_text(tmp_path / ("x" * 256), "new")


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "part-1.bin").touch()
    with atomic_folder(tmp_path, holds=("part-*.bin",)) as temporary:
        (temporary / "part-2.bin").touch()
    assert names(tmp_path) == ["part-2.bin"]
    for name in (".git", "notes.txt", "PART-1.BIN"):
        (tmp_path / name).touch()
        with pytest.raises(OSError, match=name), atomic_folder(tmp_path, holds=("part-*.bin",)):
            pytest.fail("the work began")
        (tmp_path / name).unlink()
    assert names(tmp_path) == ["part-2.bin"]


def test_outputs_that_are_inputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "folder", tmp_path / "folder" / "file"
    folder.mkdir()
    file.touch()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    for output in (file, "folder/../folder/file", "link", "hard", folder, "folder", "."):
        with pytest.raises(ConfigError, match=r"--output.*--input"):
            refuse_overwriting_inputs({"--output": output}, {"--input": ["nothing", file], "--base": None})
    with pytest.raises(ConfigError, match=r"--output.*--corpus"):
        refuse_overwriting_inputs({"--output": [folder / "new"]}, {"--corpus": folder})
    refuse_overwriting_inputs({"--output": folder / "new"}, {"--input": file, "--checkpoint": "some/hub-id"})
    refuse_overwriting_inputs({"--output": None}, {"--input": file})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '[{"a": ' + "9" * 5000 + "}]"])
def test_hostile_json_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(DatasetError, match=r"x\.json, line 1: not JSON"):
        list(read_jsonl(tmp_path / "x.json"))


@settings(max_examples=20)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.none()), max_size=4)))
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert write_jsonl(path, iter(rows)) == len(rows)
    assert list(read_jsonl(path)) == rows


def test_weights_need_names_that_are_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(b"dir \xff")
    outputs = {
        "utils.corpus.__main__": [str(tmp_path), "--output", f"{tmp_path}/{folder}"],
        "utils.checkpoint.convert.__main__": [str(tmp_path), f"{tmp_path}/{folder}"],
        "utils.checkpoint.describe": [f"{tmp_path}/{folder}"],
        "utils.training.train": ["--config", "utils/training/configs/toy.yaml", "--output", f"{tmp_path}/{folder}"],
    }
    (tmp_path / folder).mkdir()
    for module, argv in outputs.items():
        done = run_python("-m", module.removesuffix(".__main__"), *argv)
        assert (done.returncode, done.stdout) == (1, "")
        assert "the name is not UTF-8" in done.stderr


def test_json_holds_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"file": os.fsdecode(b"\xff.py"), "text": "Größe"}
    write_json(tmp_path / "x.json", value)
    write_jsonl(tmp_path / "x.jsonl", [value, {"text": "Größe"}])
    assert (read_json(tmp_path / "x.json"), next(read_jsonl(tmp_path / "x.jsonl"))) == (value, value)
    assert "Größe" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_tell_the_encoding(encoding: str, tmp_path: Path) -> None:
    text = '{"a": "é\U0001f600\\r\\n"}'
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(encoding))
    assert decode_text(path.read_bytes()) == text
    assert read_json(path) == {"a": "é\U0001f600\r\n"}
    path.write_bytes(f"{text}\r\n\n{text}".encode(encoding))
    assert list(read_jsonl(path)) == [{"a": "é\U0001f600\r\n"}] * 2
    path.write_bytes("é".encode(encoding)[:-1])
    with pytest.raises(DatasetError, match=r"x\.json is not UTF-"):
        read_json(path)


def test_json_lines_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        rows = pool.submit(lambda: list(read_jsonl(tmp_path / "pipe")))
        (tmp_path / "pipe").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
        assert rows.result(timeout=30) == [{"a": 1}, {"a": 2}]


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
    done = run_python("-c", code)
    assert done.stdout == "not installed None\n", done.stderr
