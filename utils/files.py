"""Files that appear whole or not at all, JSON lines, fingerprints and provenance.

with atomic_path("out/result.json") as temporary:
    temporary.write_text("{}")          # renamed to out/result.json when the block ends without an error
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fnmatch
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, DatasetError
from utils.locks import held, leftover_prefix, remove_leftovers_of

PROJECT_ROOT = Path(__file__).resolve().parents[1]

# What UTF-32 begins with begins with what UTF-16 begins with.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it when the block succeeds and vanishes when it fails.

    Parent folders are made. The content is flushed to disk before the rename, so a crash leaves the old file or the
    new one, never a part; what a killed writer of the same file left beside it is removed. A link stays and its target
    is replaced; a replaced file's mode is kept. A pipe or a character device is never replaced: what the block wrote
    is copied into it.

    Raises:
        OSError: Something else than a file has the name, the file is read-only, nobody reads the pipe, ….
    """
    state = _stat(path)
    if state is not None and (stat.S_ISFIFO(state.st_mode) or stat.S_ISCHR(state.st_mode)):
        with _through_stream(Path(path)) as temporary:
            yield temporary
        return
    target = _replaceable(path, state, folder=False)
    with _temporary(target, tempfile.mkstemp) as temporary:
        try:
            yield temporary
            # mkstemp makes private files; a new result is as readable as any other new file.
            temporary.chmod(_mode(state, 0o666))
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, holds: Iterable[str] | None = None) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of `path` when the block succeeds.

    An existing folder at `path` is replaced; a link to it stays. If another process puts one there first, theirs is
    kept. What a killed writer of the same folder left beside it is removed, or goes back to its place.

    Args:
        path: The folder.
        holds: Names and patterns of what such a folder holds. One with anything else in it is refused, before the
            work: where a user names the folder, it may be any (`--output ~`). None: whatever it holds is replaced.

    Raises:
        OSError: The folder is read-only or holds something else, or is none.
    """
    state = _stat(path)
    target = _replaceable(path, state, folder=True)
    if state is not None and holds is not None:
        _check_holds_only(target, tuple(holds))
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(_temporary(target, tempfile.mkdtemp))
        old = temporary.with_suffix(".old")
        try:
            yield temporary
            temporary.chmod(_mode(state, 0o777))
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(held(target))
                target.rename(old)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():
                    # Nothing took its place: what was there goes back.
                    with contextlib.suppress(FileNotFoundError):
                        old.rename(target)
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def check_name(path: str | Path) -> None:
    """Refuse a place whose name is not UTF-8, before any work: the safetensors library cannot open files in it.

    Raises:
        ConfigError: It is not.
    """
    try:
        str(Path(path).absolute()).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path}: the name is not UTF-8, and weights cannot be read or written there: rename it"
        ) from None


def is_stream(path: str | Path) -> bool:
    """Whether a name is a pipe or a device, which is written into and keeps nothing beside it."""
    state = _stat(path)
    return state is not None and not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode))


def refuse_overwriting_inputs(
    outputs: Mapping[str, str | Path | Iterable[str | Path] | None],
    inputs: Mapping[str, str | Path | Iterable[str | Path] | None],
) -> None:
    """Refuse to write over what is read.

    Args:
        outputs: Flag → files or folders that the command will write, whole.
        inputs: Flag → files or folders that it reads; names of nothing (a hub id) and None are passed over.

    Raises:
        ConfigError: An output is an input (also by a link, or another name of the same file), lies in an input folder,
            or is a folder around an input.
    """
    for output_flag, output in _flat(outputs):
        there = _stat(output) is not None
        for input_flag, source in _flat(inputs):
            if _stat(source) is None or is_stream(source):
                continue
            written, read = output.resolve(), source.resolve()
            if (there and output.samefile(source)) or read in written.parents or written in read.parents:
                raise ConfigError(
                    f"{output_flag} {output} would write over what {input_flag} {source} reads: choose another output"
                )


def _flat(named: Mapping[str, str | Path | Iterable[str | Path] | None]) -> Iterator[tuple[str, Path]]:
    for flag, paths in named.items():
        for path in [paths] if isinstance(paths, str | Path) else paths or ():
            yield flag, Path(path)


def _stat(path: str | Path) -> os.stat_result | None:
    """What a name leads to; None where nothing is there, or a link leads to nothing."""
    try:
        return Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _replaceable(path: str | Path, state: os.stat_result | None, *, folder: bool) -> Path:
    """What is to be replaced: where a link leads to in the end, also to nothing; any other path as it is."""
    path = Path(path)
    target = path.resolve() if path.is_symlink() or path.name in ("", "..") else path
    if state is None:
        return target
    is_folder = stat.S_ISDIR(state.st_mode)
    if folder and not is_folder:
        raise OSError(errno.ENOTDIR, "not replaced, for it is no folder", str(path))
    if not folder and not stat.S_ISREG(state.st_mode):
        code = errno.EISDIR if is_folder else errno.EINVAL
        raise OSError(code, "not replaced, for it is no file", str(path))
    # root may write all the same, and would not be told by the system.
    if not state.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, "not replaced, for it is read-only (chmod u+w allows it)", str(target))
    return target


def _mode(state: os.stat_result | None, new: int) -> int:
    """The mode of what is replaced; else that of anything new."""
    if state is not None:
        return stat.S_IMODE(state.st_mode) & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return new & ~mask


def _check_holds_only(folder: Path, patterns: tuple[str, ...]) -> None:
    for entry in folder.iterdir():
        if not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns):
            lost = f"not replaced, for {entry.name!r} in it, which no such folder holds, would be lost"
            raise OSError(errno.ENOTEMPTY, lost, str(folder))


@contextlib.contextmanager
def _temporary(target: Path, make: Callable[..., Any]) -> Iterator[Path]:
    """A temporary file or folder beside its target, locked so that it is known as used; errors name the target."""
    with contextlib.ExitStack() as stack:
        made = None
        # Before it is locked, another writer of the target may take it for a leftover: then there is a next one.
        while made is None or not made.exists():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers_of(target)
                new = make(prefix=leftover_prefix(target), suffix=".tmp", dir=target.parent)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from None
            if not isinstance(new, str):
                os.close(new[0])
                new = new[1]
            made = Path(new)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(held(made, wait=True))
        yield made


@contextlib.contextmanager
def _through_stream(path: Path) -> Iterator[Path]:
    """A temporary file whose content is written into a pipe or device in the end."""
    try:
        # Without O_NONBLOCK a pipe that nobody reads would keep us for ever.
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        message = "nobody reads the pipe" if error.errno == errno.ENXIO else error.strerror
        raise OSError(error.errno, message, str(path)) from None
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb", buffering=0) as stream, tempfile.TemporaryDirectory(prefix="code-llava-") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        yield temporary
        content = memoryview(temporary.read_bytes())
        try:
            while content:
                content = content[stream.write(content) :]
        except OSError as error:
            # Not as a BrokenPipeError, by which commands know that nobody reads their standard output.
            code = errno.EIO if error.errno == errno.EPIPE else error.errno
            raise OSError(code, f"{error.strerror}: not all was written", str(path)) from None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None, encoding: str = "utf-8") -> str:
    """JSON as an encoding can hold it, else with escapes: names of files may hold what UTF-8 has no bytes for."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def text_encoding(head: bytes) -> str:
    """The encoding that a byte order mark tells, which decoding then leaves out; UTF-8 where there is none.

    Args:
        head: The first four bytes of a text, or more.
    """
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")


def decode_text(data: bytes) -> str:
    """A text of somebody's, every character as it is (line ends included), without its byte order mark.

    Raises:
        UnicodeDecodeError: It has no byte order mark and is not UTF-8, or is not what its mark says.
    """
    return data.decode(text_encoding(data))


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        DatasetError: The file is missing, not UTF-8 or not JSON; the message names it.
    """
    with _reading_text(path):
        text = decode_text(Path(path).read_bytes())
    return parse_json(text, f"{path} is")


@contextlib.contextmanager
def _reading_text(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not {error.encoding.upper()} text (byte {error.start})") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON from anywhere.

    Args:
        text: The JSON.
        where: What the message begins with, up to "not JSON".

    Raises:
        DatasetError: It is not JSON, nested too deeply, or has a number of more digits than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DatasetError(f"{where} not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise DatasetError(f"{where} not JSON: {error}") from None


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; returns the number of rows."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        for row in rows:
            stream.write(json_text(row) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; blank lines are passed over.

    Raises:
        DatasetError: A line is not a JSON object; the message names file and line number.
    """
    with _reading_text(path), Path(path).open("rb") as data:
        # Looked at, not read: it may be a pipe.
        stream = io.TextIOWrapper(data, encoding=text_encoding(data.peek(4)), newline="\n")
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}, line {number}:")
            if not isinstance(row, dict):
                raise DatasetError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield row


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def git_commit() -> str | None:
    """The project's commit, with `+` when tracked files differ from it; None outside a checkout."""
    commands = ("git rev-parse HEAD", "git status --porcelain --untracked-files=no")
    options: dict[str, Any] = {"cwd": PROJECT_ROOT, "capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        commit, changed = (subprocess.run(line.split(), **options).stdout.strip() for line in commands)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def provenance(packages: Iterable[str] = ("torch", "transformers", "numpy")) -> dict[str, Any]:
    """What a result needs to be repeated: our commit, Python, platform and package versions.

    A package that is not there is left out; the project itself may be run from its folder, and then says so.
    """
    versions = {name: version for name in packages if (version := package_version(name)) is not None}
    return {
        "code_llava": package_version("code-llava") or "not installed",
        "commit": git_commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **versions,
    }


@cache
def package_version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    # Once a process: reading a package's metadata takes milliseconds. Late: the module takes 30 ms of every `--help`.
    import importlib.metadata

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
