"""Files that appear whole or not at all, JSON lines, fingerprints and provenance.

with atomic_path("out/result.json") as temporary:
    temporary.write_text("{}")          # renamed to out/result.json when the block ends without an error
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from utils.errors import DatasetError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it when the block succeeds and vanishes when it fails.

    Parent folders are made. The content is flushed to disk before the rename, so a crash leaves the old file or the
    new one, never a part.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other new file.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes the place of `path` when the block succeeds.

    An existing folder at `path` is replaced. If another process puts one there first, theirs is kept.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        with contextlib.suppress(FileNotFoundError):
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        DatasetError: The file is missing, not UTF-8 or not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # also a number of too many digits, and too deep nesting
        raise DatasetError(f"{path} is not JSON: {error}") from None


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; returns the number of rows."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; blank lines are passed over.

    Raises:
        DatasetError: A line is not a JSON object; the message names file and line number.
    """
    try:
        stream = Path(path).open(encoding="utf-8", newline="\n")  # noqa: SIM115 - closed by the with below
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    with stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DatasetError(f"{path}, line {number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise DatasetError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
                yield row
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path} is not UTF-8 text ({error.reason})") from None


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@cache
def git_commit() -> str | None:
    """The project's commit, with `+` when tracked files differ from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=10
    ).stdout


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
    # Once a process: reading a package's metadata takes milliseconds.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
