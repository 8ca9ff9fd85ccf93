"""A folder of small files found by key: no lock, a size limit, least recently used entries leave first.

    files = LatentFiles(Path("~/.cache/code-llava/latents"), limit_bytes=4 << 30)
    files.write({key: [header, data]})
    files.read(key)                                      # a bytearray; FileNotFoundError where there is none

A key is one file, `<root>/v3/ab/cdef…`. It appears by rename and changes only its time stamp, that of its last use, so
that threads and processes, also forked ones, share a folder freely. Nothing is flushed to the disk: what a crash tears
fails the checksum that callers put into the value, and is written again. Folders and files are the user's alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# A hit must not cost a disk write: a time stamp younger than this stays as it is.
TOUCH_INTERVAL_S = 60.0
# Eviction makes some room to spare, so that a full folder does not evict at every write.
EVICT_TO = 0.9
LEFTOVER_AGE_S = 3600.0

_LAYOUT, _TEMPORARY = "v3", ".put-"
_SHARD, _NAME = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{62}")
# Other processes write too: after this part of the limit the size is estimated anew, from about so many entries.
RECOUNT_PART, SAMPLED_ENTRIES = 16, 4096
_BLOCK_BYTES = 4096
# Not through a link, and without waiting for a pipe's writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class Entry(NamedTuple):
    """A file with its last use and its size in whole blocks."""

    last_use_ns: int
    path: Path
    size_bytes: int

    @property
    def key(self) -> bytes:
        """The key it was written under."""
        return bytes.fromhex(self.path.parent.name + self.path.name)


class LatentFiles:
    """One folder, made where it is not there. Every method may be called from any thread.

    Args:
        folder: Private to the user. One that holds other things too (`~`) keeps its mode: `v3` in it is private.
        limit_bytes: Above it entries leave.

    Raises:
        OSError: It cannot be made, or other users can write into it.
        RuntimeError: There is no home folder, or the path is a ring of links.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.root = folder.expanduser().resolve()
        self.limit_bytes = limit_bytes
        self._layout = self.root / _LAYOUT
        self._used_bytes = 0  # an estimate, made before `_uncounted_bytes` were written
        self._uncounted_bytes = limit_bytes
        self.root.parent.mkdir(parents=True, exist_ok=True)
        _make(self.root)
        if (self.root / "v2" / "latents.sqlite").is_file():  # an earlier version's, which nothing can read any more
            for old in ("v2", "lock"):
                _remove(self.root / old)
        _claim(self.root, private=all(path.name == _LAYOUT for path in self.root.iterdir()))
        _make(self._layout)
        _claim(self._layout, private=True)
        self._remove_leftovers()

    def read(self, key: bytes, is_use: bool = True) -> bytearray:
        """The value of a key; a use keeps it from being evicted soon.

        Raises:
            FileNotFoundError: There is none.
            OSError: It cannot be read, or is no file.
        """
        path = self._path(key)
        with os.fdopen(os.open(path, _READ), "rb", buffering=0) as stream:
            state = os.fstat(stream.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise OSError(errno.EINVAL, "an entry is no file", path)
            value = bytearray(state.st_size)
            del value[stream.readinto(value) :]
        if is_use and abs(time.time() - state.st_mtime) > TOUCH_INTERVAL_S:
            with contextlib.suppress(OSError):  # evicted meanwhile, or a folder that may only be read
                os.utime(path)
        return value

    def write(self, values: Mapping[bytes, Sequence[bytes | memoryview]]) -> int:
        """Add the pieces of each key's value; a key that is there keeps its own.

        Returns:
            How many were left out because together they pass the limit.

        Raises:
            OSError: The disk is full, the folder cannot be written, ….
        """
        fitting: list[bytes] = []
        incoming = left_out = 0
        for key, pieces in values.items():
            size = _blocks(sum(map(len, pieces)))
            if Path(self._path(key)).is_file():
                continue
            if incoming + size > self.limit_bytes:
                left_out += 1
            else:
                fitting.append(key)
                incoming += size
        if fitting:
            self._make_room(incoming)
        for key in fitting:
            self._put(Path(self._path(key)), values[key])
        return left_out

    def remove(self, key: bytes) -> None:
        """Remove an entry, whatever lies in its place."""
        _remove(Path(self._path(key)))

    def entries(self) -> Iterator[Entry]:
        """All entries, in no order."""
        for shard in self._shards():
            yield from _entries(shard)

    def evict(self, limit_bytes: int, target_bytes: int) -> int:
        """Where all entries pass the limit, remove those used longest ago down to the target; returns how many."""
        self._remove_leftovers()
        entries = sorted(self.entries(), reverse=True)
        before = len(entries)
        self._used_bytes, self._uncounted_bytes = sum(entry.size_bytes for entry in entries), 0
        if self._used_bytes > limit_bytes:
            while entries and self._used_bytes > target_bytes:
                oldest = entries.pop()
                _remove(oldest.path)
                self._used_bytes -= oldest.size_bytes
        return before - len(entries)

    def _path(self, key: bytes) -> str:
        # A text, not a Path: a hit must be quick.
        name = key.hex()
        return f"{self._layout}{os.sep}{name[:2]}{os.sep}{name[2:]}"

    def _put(self, path: Path, pieces: Sequence[bytes | memoryview]) -> None:
        for folder in (self.root, self._layout):  # someone may have removed them
            _make(folder)
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._layout)
        temporary = Path(name)
        try:
            temporary.chmod(0o600)
            with os.fdopen(handle, "wb") as stream:
                stream.writelines(pieces)
            now = time.time_ns()  # finer than the stamps that a file system gives
            os.utime(temporary, ns=(now, now))
            # What is no folder, or a folder in the file's place, is not ours. Where nothing is, another thread may
            # make the folder meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(path.parent.lstat().st_mode):
                    _remove(path.parent)
                elif stat.S_ISDIR(path.lstat().st_mode):
                    _remove(path)
            _make(path.parent)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, incoming: int) -> None:
        """Evict where the estimated size, with what is to come, passes the limit."""
        if self._uncounted_bytes * RECOUNT_PART >= self.limit_bytes:
            self._used_bytes, self._uncounted_bytes = self._estimate(), 0
        if self._used_bytes + incoming > self.limit_bytes:
            self.evict(self.limit_bytes - incoming, int(self.limit_bytes * EVICT_TO) - incoming)
        self._used_bytes += incoming
        self._uncounted_bytes += incoming

    def _estimate(self) -> int:
        """The size of all entries, from some shards: keys are hashes, so that all shards are alike."""
        shards = self._shards()
        num_entries = size = 0
        for num_shards, shard in enumerate(shards, start=1):
            for entry in _entries(shard):
                num_entries, size = num_entries + 1, size + entry.size_bytes
            if num_entries > SAMPLED_ENTRIES:
                return size * len(shards) // num_shards
        return size

    def _shards(self) -> list[Path]:
        return [path for path in self._layout.glob("??") if _SHARD.fullmatch(path.name)]

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of killed writers."""
        for path in self._layout.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > LEFTOVER_AGE_S:
                    path.unlink()


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)  # a umask may keep out even the user


def _claim(folder: Path, private: bool) -> None:
    """Keep other users out of our folder; refuse one that they can write into."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "something else is in the folder's place", str(folder))
    if private and state.st_uid == os.geteuid() and state.st_mode & 0o077:
        folder.chmod(stat.S_IMODE(state.st_mode) & ~0o077)
        state = folder.lstat()
    # In a sticky folder (/tmp) nobody else can rename what is ours.
    by_mode = state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX
    if by_mode or (state.st_uid not in (0, os.geteuid()) and os.geteuid() != 0):
        raise PermissionError(errno.EACCES, "other users can write into it", str(folder))


def _entries(shard: Path) -> Iterator[Entry]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(shard) as found:
        for entry in found:
            if _NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                    state = entry.stat(follow_symlinks=False)
                    yield Entry(state.st_mtime_ns, Path(entry.path), _blocks(state.st_size))


def _blocks(size: int) -> int:
    """What a file takes on the disk."""
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; one that is gone already is no error."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if path.is_symlink() or not path.is_dir():
            raise
        shutil.rmtree(path)
