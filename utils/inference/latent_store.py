"""Key-value bytes on disk in LMDB: many processes at once, a size limit, least recently used entries leave first.

    store = LatentStore.shared("~/.cache/code-llava/latents")
    store.write([(key, value)], limit_bytes=4 << 30)
    store.read([key])                                    # [bytearray | None]

This module knows no tensor; `latent_cache.py` says what the values mean and checks them. It never gives back less than
LMDB stored, but it cannot tell whether the disk kept it: callers put a checksum into the value.

Layout: `<root>/v1/data.mdb` is the database, `<root>/lock` a file lock that one process at a time holds, for some
milliseconds, for reading too. It takes the place of LMDB's own locks, because the kernel frees it when its holder is
killed (waiters on LMDB's shared mutexes can then sleep for ever) and because it covers replacing the database too.

A damaged file is noticed and replaced by an empty one, except that LMDB trusts the pages of its search tree (about a
thousandth of the file): random bytes there can end the process. A file system that several machines share (NFS) is no
place for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb

logger = logging.getLogger(__name__)

# Address space, not disk: the file grows with its content. It bounds what any size limit can ask for.
MAP_BYTES = 1 << 38
MAX_LIMIT_BYTES = MAP_BYTES // 2
# Eviction makes some room to spare, so that a full store does not scan for the oldest entry at every write.
EVICT_TO = 0.9
LOCK_TIMEOUT_S = 10.0

_LAYOUT = "v1"
_TRASH = ".trash-"
_PAGE_BYTES = 4096
_USE = struct.Struct("<dQ")  # last use in seconds since the epoch, size in bytes
_TOTAL = struct.Struct("<Q")
_TOTAL_KEY = b"total_bytes"
# What LMDB raises when the file itself is damaged, as opposed to full, busy or forbidden. Every process maps the same
# size and asks in good order, so a "grown" map and a "bad" transaction come from damaged pages, too.
_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
    lmdb.MapResizedError,
    lmdb.BadTxnError,
    lmdb.ProblemError,
    lmdb.PageFullError,
    lmdb.IncompatibleError,
    struct.error,
)

_shared: dict[Path, LatentStore] = {}
_shared_lock = threading.RLock()


class LatentStore:
    """One database folder. Make it with `shared`; every method may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.RLock()
        self._users = 0
        self._env: lmdb.Environment | None = None
        self._dbs: tuple[Any, Any, Any] = (None, None, None)
        self._inode = 0
        self._file_bytes = 0

    @classmethod
    def shared(cls, root: str | Path) -> LatentStore:
        """This process's store at `root`, opened now; `release` it when done.

        Raises:
            OSError: The folder cannot be made or written.
        """
        path = Path(root).expanduser().resolve()
        path.mkdir(parents=True, exist_ok=True)
        with _shared_lock:
            store = _shared.setdefault(path, cls(path))
            with store._lock:
                try:
                    with store._begin():
                        store._users += 1
                finally:
                    if not store._users:
                        del _shared[path]
        return store

    def release(self) -> None:
        """Give back one `shared`; the last one closes the database."""
        with _shared_lock, self._lock:
            self._users -= 1
            if self._users <= 0:
                self._close()
                _shared.pop(self.root, None)

    def read(self, keys: Sequence[bytes]) -> list[bytearray | None]:
        """Copies of the values, None for a key that is not there.

        Raises:
            lmdb.Error: The database cannot be read; a damaged one has been replaced by an empty one.
        """
        with self._begin() as (transaction, (values, _, _)):
            views = (transaction.get(key, db=values) for key in keys)
            return [None if view is None else bytearray(view) for view in views]

    def write(self, items: Iterable[tuple[bytes, bytes]], limit_bytes: int, now: float | None = None) -> int:
        """Add entries in one transaction; a key that is there keeps its value.

        Args:
            items: Keys and values.
            limit_bytes: Where the entries' sizes would pass it, those used longest ago are evicted first.
            now: Seconds since the epoch; the clock's without it.

        Returns:
            How many entries were left out because the new ones alone pass the limit.

        Raises:
            lmdb.Error: Nothing was written: the disk is full, the database cannot be used, ….
        """
        now = time.time() if now is None else now
        left_out = 0
        with self._begin(write=True) as (transaction, (values, uses, _)):
            missing = [(key, value) for key, value in items if transaction.get(key, db=uses) is None]
            total = self._total(transaction)
            incoming = sum(_disk_bytes(value) for _, value in missing)
            if total + incoming > limit_bytes:
                total = self._evict(transaction, max(0, int(limit_bytes * EVICT_TO) - incoming))
            for key, value in missing:
                size = _disk_bytes(value)
                if total + size > limit_bytes:
                    left_out += 1
                    continue
                transaction.put(key, value, db=values)
                transaction.put(key, _USE.pack(now, size), db=uses)
                total += size
            self._set_total(transaction, total)
        return left_out

    def touch(self, keys: Iterable[bytes], now: float | None = None) -> None:
        """Note that entries were used, so that eviction takes others first."""
        now = time.time() if now is None else now
        with self._begin(write=True) as (transaction, (_, uses, _)):
            for key in keys:
                record = transaction.get(key, db=uses)
                if record is not None:
                    transaction.put(key, _USE.pack(now, _USE.unpack(record)[1]), db=uses)

    def delete(self, keys: Iterable[bytes]) -> int:
        """Remove entries; returns how many were there."""
        with self._begin(write=True) as (transaction, _):
            return sum(self._delete(transaction, key) for key in keys)

    def usage(self) -> tuple[int, int, int]:
        """Number of entries, their bytes, and the bytes of the database file."""
        with self._begin() as (transaction, (_, uses, _)):
            return transaction.stat(uses)["entries"], self._total(transaction), self._data_file.stat().st_size

    def keys(self) -> list[bytes]:
        """All keys, least recently used first."""
        with self._begin() as (transaction, _):
            return [key for _, key, _ in self._by_age(transaction)]

    def shrink(self, limit_bytes: int) -> int:
        """Evict down to `limit_bytes`, then give the free room back to the file system; returns the evicted entries."""
        with self._exclusive(), self._replacing_damage():
            with self._environment().begin(write=True, buffers=True) as transaction:
                before = transaction.stat(self._dbs[1])["entries"]
                self._evict(transaction, limit_bytes)
                after = transaction.stat(self._dbs[1])["entries"]
            fresh = Path(tempfile.mkdtemp(prefix=_TRASH, dir=self.root))
            self._environment().copy(str(fresh), compact=True)
            self._replace_folder(fresh)
        return int(before - after)

    def clear(self) -> None:
        """Start over with an empty database; other processes move on to it at their next use."""
        with self._exclusive():
            self._replace_folder(None)

    @property
    def _data_file(self) -> Path:
        return self.root / _LAYOUT / "data.mdb"

    @contextlib.contextmanager
    def _begin(self, write: bool = False) -> Iterator[tuple[lmdb.Transaction, tuple[Any, Any, Any]]]:
        """A transaction and the databases (values, uses, totals); damage of the file replaces it."""
        with (
            self._exclusive(),
            self._replacing_damage(),
            self._environment().begin(write=write, buffers=True) as transaction,
        ):
            yield transaction, self._dbs

    @contextlib.contextmanager
    def _replacing_damage(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            self._start_over(error)
            raise lmdb.CorruptedError(str(error)) from None
        except lmdb.PanicError:
            self._close()  # LMDB refuses further use of this environment; the file is as the last commit left it
            raise

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other threads and processes out, and the process from forking.

        Raises:
            lmdb.LockError: Another process has held the lock for `LOCK_TIMEOUT_S`.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        with self._lock, (self.root / "lock").open("a") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise lmdb.LockError(f"another process has held {stream.name} for {LOCK_TIMEOUT_S} s") from None
                    time.sleep(0.001)
            yield

    def _environment(self) -> lmdb.Environment:
        """The open environment; opens it first, and again after another process replaced the database."""
        if self._env is not None:
            state = self._data_file.stat() if self._data_file.exists() else None
            if state is not None and state.st_ino == self._inode:
                if state.st_size < self._file_bytes:
                    # Reading past the end of a mapped file kills the process: never touch a file that shrank.
                    raise lmdb.CorruptedError(f"{self._data_file} was cut to {state.st_size} bytes")
                self._file_bytes = state.st_size
                return self._env
        for leftover in self.root.glob(_TRASH + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            return self._open()
        except _DAMAGE as error:
            self._start_over(error)
            return self._open()

    def _open(self) -> lmdb.Environment:
        self._close()
        folder = self._data_file.parent
        folder.mkdir(exist_ok=True)
        # metasync=False: a power cut may lose the last writes, never the database.
        environment = lmdb.open(str(folder), map_size=MAP_BYTES, max_dbs=3, metasync=False, lock=False)
        try:
            state = self._data_file.stat()
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if state.st_size < needed:
                raise lmdb.CorruptedError(f"{self._data_file} has {state.st_size} bytes, expected {needed}")
            values, uses, totals = (environment.open_db(name) for name in (b"values", b"uses", b"totals"))
        except BaseException:
            environment.close()
            raise
        self._dbs = values, uses, totals
        self._env, self._inode, self._file_bytes = environment, state.st_ino, state.st_size
        return environment

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None

    def _replace_folder(self, fresh: Path | None) -> None:
        """Put `fresh` (None: nothing) where the database is."""
        self._close()
        folder = self._data_file.parent
        trash = Path(tempfile.mkdtemp(prefix=_TRASH, dir=self.root))
        if folder.exists():
            folder.rename(trash / _LAYOUT)
        if fresh is not None:
            fresh.rename(folder)
        shutil.rmtree(trash, ignore_errors=True)

    def _start_over(self, error: Exception) -> None:
        logger.warning("the latent cache %s is damaged (%s): starting an empty one", self.root, error)
        self._replace_folder(None)

    def _by_age(self, transaction: lmdb.Transaction) -> list[tuple[float, bytes, int]]:
        """(last use, key, size) of all entries, the oldest first."""
        uses = self._dbs[1]
        records = ((bytes(key), _USE.unpack(record)) for key, record in transaction.cursor(uses))
        return sorted((last_use, key, size) for key, (last_use, size) in records)

    def _evict(self, transaction: lmdb.Transaction, target_bytes: int) -> int:
        """Delete entries, the least recently used first, until `target_bytes` are left; returns what is left."""
        total = self._total(transaction)
        for _, key, _ in self._by_age(transaction):
            if total <= target_bytes:
                break
            self._delete(transaction, key)
            total = self._total(transaction)
        return total

    def _delete(self, transaction: lmdb.Transaction, key: bytes) -> bool:
        values, uses, _ = self._dbs
        record = transaction.get(key, db=uses)
        if record is None:
            return False
        self._set_total(transaction, self._total(transaction) - _USE.unpack(record)[1])
        transaction.delete(key, db=uses)
        transaction.delete(key, db=values)
        return True

    def _total(self, transaction: lmdb.Transaction) -> int:
        record = transaction.get(_TOTAL_KEY, db=self._dbs[2])
        return 0 if record is None else int(_TOTAL.unpack(record)[0])

    def _set_total(self, transaction: lmdb.Transaction, total: int) -> None:
        transaction.put(_TOTAL_KEY, _TOTAL.pack(total), db=self._dbs[2])


def _disk_bytes(value: bytes) -> int:
    """What a value takes on disk: whole pages (with their header) once it does not fit beside others."""
    size = len(value)
    return size if size < _PAGE_BYTES // 2 else -(-(size + 16) // _PAGE_BYTES) * _PAGE_BYTES


def _before_fork() -> None:
    """Wait for running transactions and close: an environment must not live on in a child."""
    _shared_lock.acquire()
    for store in _shared.values():
        store._lock.acquire()
        store._close()


def _after_fork() -> None:
    """Parent and child: stores open again at their next use."""
    for store in _shared.values():
        store._lock.release()
    _shared_lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
