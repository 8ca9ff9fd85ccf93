"""One writer a folder, and what writers left that were killed.

with sole_writer("out") as held:            # an error where another process has it
    if held:
        remove_leftovers(Path("out"), "*.jsonl")

The operating system frees a lock when its process ends, however it ends: no lock is ever stale, and its file may lie
about. Where a file system has no locks there is a warning, and nothing is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: what killed writers leave stays there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# As `atomic_path` and `atomic_folder` name what they are about to put in place, and what they put aside.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]+\.(?P<kind>tmp|old)", re.DOTALL)
_RANDOM = re.compile(r"[a-z0-9_]{8}\.(?P<kind>tmp|old)")  # as tempfile draws it
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextlib.contextmanager
def sole_writer(folder: str | Path, *, lock: Path | None = None, wait: bool = False) -> Iterator[bool]:
    """Keep other processes from writing a folder until the block ends; within one thread it may be nested.

    Args:
        folder: The folder.
        lock: The lock's file; `.lock` in the folder by default, which is then made. One beside it is for a folder that
            is replaced whole.
        wait: Wait for another writer; by default that is an error.

    Yields:
        Whether there is a lock: False, after a warning, on a file system that has none.

    Raises:
        ConfigError: Another process writes the folder; the message has its number, if that is known.
        OSError: The lock's file cannot be made.
    """
    path = (lock or Path(folder) / LOCK_FILE).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.parent.resolve() / path.name
    # The lock's own file is not for this: who tries in vain may empty it.
    writer = path.with_name(f"{path.name}.pid")
    held = _acquired(Path(folder), path, writer, wait)
    outermost = held is not None and held.lock_counter == 1
    try:
        if outermost:
            with contextlib.suppress(OSError):
                writer.write_text(f"{os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield held is not None
    finally:
        if held is not None:
            if outermost:
                with contextlib.suppress(OSError):
                    writer.unlink()
            held.release()


def _acquired(folder: Path, path: Path, writer: Path, wait: bool) -> Any:
    """The lock, taken; None where there are no locks."""
    from filelock import FileLock, SoftFileLock, Timeout

    # One object a path in a process: taken again by the same thread it only counts.
    lock = FileLock(path, is_singleton=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ConfigError(
            f"{folder} is being written by another run{_named(writer)}: wait for it, or give another folder"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    else:
        if not isinstance(lock, SoftFileLock):
            return lock
        # What stands in for a lock there would outlive a process that is killed.
        lock.release()
    logger.warning("%s is on a file system without locks: let no other run write it meanwhile", folder)
    return None


def _named(writer: Path) -> str:
    """` (process 7 on host)`, or nothing."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = writer.read_text(encoding="utf-8").strip()
        if text.isprintable() and 0 < len(text) < 100:
            return f" (process {text})"
    return ""


@contextlib.contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file or folder that is being made, until the block or the process ends.

    Args:
        path: It.
        wait: Wait for another process that has it.

    Yields:
        Whether that could be done; not where another process has it, or where there are no locks.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    handle = None
    if fcntl is not None:
        with contextlib.suppress(PermissionError):  # a folder may be written and not read
            handle = os.open(path, os.O_RDONLY)
    try:
        locked = False
        with contextlib.suppress(OSError):
            if handle is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                locked = True
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


def leftover_prefix(target: Path) -> str:
    """How the name of a temporary file or folder beside its target begins."""
    return f".{target.name[:50]}."  # a name may have 255 bytes


def remove_leftovers_of(target: Path) -> None:
    """Remove what killed writers of one file or folder left beside it; what others are writing is left alone.

    A whole folder that had been put aside for a new one, which did not come, goes back to its place.
    """
    prefix = leftover_prefix(target)
    # Most names are of other things, in a folder that may have many.
    for path in _listed(target.parent):
        match = _RANDOM.fullmatch(path.name, len(prefix)) if path.name.startswith(prefix) else None
        if match is None or path.is_symlink():
            continue
        with contextlib.suppress(OSError), held(path) as is_unused:
            if is_unused:
                _clear(path, target, match["kind"])


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what killed writers left of some files and folders; only to be called while their folder is locked.

    Something whole that had been put aside for a new one, which did not come, goes back to its place.

    Args:
        folder: Where they are.
        names: Shell patterns of what they were to become.
    """
    for path in _listed(folder):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or path.is_symlink() or not any(fnmatch.fnmatchcase(match["name"], name) for name in names):
            continue
        with contextlib.suppress(OSError):
            _clear(path, folder / match["name"], match["kind"])
            logger.info("%s was left by a run that was killed", path)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _clear(path: Path, target: Path, kind: str) -> None:
    """Remove one leftover, or put it back into its place."""
    if kind == "old" and not target.exists():
        path.rename(target)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
