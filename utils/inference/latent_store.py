"""Key-value bytes on disk in SQLite: many processes at once, a size limit, least recently used entries leave first.

    store = LatentStore.shared("~/.cache/code-llava/latents")
    store.write([(key, value)], limit_bytes=4 << 30)
    store.read([key])                                    # [bytearray | None]

This module knows no tensor; `latent_cache.py` says what the values mean and checks them. SQLite reports pages that make
no sense, and the database is then replaced by an empty one. It cannot tell whether the disk kept a value's bytes:
callers put a checksum of key and bytes into the value.

Layout: `<root>/v2/latents.sqlite` is the database, `<root>/lock` a file lock that one process at a time holds, for some
milliseconds, for reading too: it covers replacing the database, which SQLite's own locks do not. A file system that
several machines share (NFS) is no place for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_LIMIT_BYTES = 1 << 41  # half of what SQLite holds in pages of 4096 bytes
# Eviction makes some room to spare, so that a full store does not evict at every write.
EVICT_TO = 0.9
LOCK_TIMEOUT_S = 10.0

_PAGE_BYTES = 4096
_LAYOUT = "v2"
_TRASH = ".trash-"
_EMPTY_BYTES = 16 * _PAGE_BYTES  # more than the tables take without entries
# Values lie apart from what is written at every use. No AUTOINCREMENT: freed ids are used again.
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, last_use REAL NOT NULL);
    CREATE INDEX IF NOT EXISTS entries_by_age ON entries (last_use);
    CREATE TABLE IF NOT EXISTS latents (id INTEGER PRIMARY KEY, value BLOB NOT NULL);
"""
# What these statements can only meet in a damaged file, as opposed to a full, busy or forbidden one.
_DAMAGE_CODES = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,  # no such table, malformed schema
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_TOOBIG,
    }
)

_shared: dict[Path, LatentStore] = {}
_shared_lock = threading.RLock()


class LatentStore:
    """One database folder. Make it with `shared`; every method may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.RLock()
        self._users = 0
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    @classmethod
    def shared(cls, root: str | Path) -> LatentStore:
        """This process's store at `root`, opened now; `release` it when done.

        Raises:
            OSError: The folder cannot be made or written.
            sqlite3.Error: The database cannot be used.
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
            sqlite3.Error: The database cannot be read; a damaged one has been replaced by an empty one.
        """
        with self._begin() as connection:
            return [_read(connection, key) for key in keys]

    def write(self, items: Iterable[tuple[bytes, bytes]], limit_bytes: int, now: float | None = None) -> int:
        """Add entries in one transaction; a key that is there keeps its value.

        Args:
            items: Keys and values.
            limit_bytes: Where the pages in use would pass it, entries used longest ago are evicted first.
            now: Seconds since the epoch; the clock's without it.

        Returns:
            How many entries were left out because the new ones alone pass the limit.

        Raises:
            sqlite3.Error: Nothing was written: the disk is full, the database cannot be used, ….
        """
        now = time.time() if now is None else now
        left_out = 0
        with self._begin(write=True) as connection:
            query = "SELECT 1 FROM entries JOIN latents USING (id) WHERE key = ?"
            missing = {key: value for key, value in items if connection.execute(query, (key,)).fetchone() is None}
            incoming = sum(_disk_bytes(value) for value in missing.values())
            used = _used_bytes(connection)
            if used + incoming > limit_bytes:
                used = _evict(connection, max(0, int(limit_bytes * EVICT_TO) - incoming))
            for key, value in missing.items():
                if used + _disk_bytes(value) > limit_bytes:
                    left_out += 1
                    continue
                added = connection.execute("INSERT INTO entries (key, last_use) VALUES (?, ?)", (key, now))
                connection.execute("INSERT INTO latents (id, value) VALUES (?, ?)", (added.lastrowid, value))
                used = _used_bytes(connection)
        return left_out

    def touch(self, keys: Iterable[bytes], now: float | None = None) -> None:
        """Note that entries were used, so that eviction takes others first."""
        now = time.time() if now is None else now
        with self._begin(write=True) as connection:
            connection.executemany("UPDATE entries SET last_use = ? WHERE key = ?", ((now, key) for key in keys))

    def delete(self, keys: Iterable[bytes]) -> int:
        """Remove entries; returns how many were there."""
        with self._begin(write=True) as connection:
            ids = {found for key in keys if (found := _find(connection, key)) is not None}
            _delete(connection, ids)
        return len(ids)

    def usage(self) -> tuple[int, int, int]:
        """Number of entries, the bytes of the pages in use, and the bytes of the database file."""
        with self._begin() as connection:
            return _count(connection), _used_bytes(connection), self._data_file.stat().st_size

    def keys(self) -> list[bytes]:
        """All keys, least recently used first."""
        with self._begin() as connection:
            return [bytes(key) for (key,) in connection.execute("SELECT key FROM entries ORDER BY last_use, id")]

    def forget_pages(self) -> None:
        """Read from the file again, not from pages that this process has in memory."""
        with self._lock:
            self._close()

    def shrink(self, limit_bytes: int) -> int:
        """Evict down to `limit_bytes`, then give the free room back to the file system; returns the evicted entries."""
        with self._exclusive(), self._replacing_damage():
            with self._transaction(write=True) as connection:
                before = _count(connection)
                _evict(connection, limit_bytes)
                after = _count(connection)
            fresh = Path(tempfile.mkdtemp(prefix=_TRASH, dir=self.root))
            self._opened().execute("VACUUM INTO ?", (str(fresh / self._data_file.name),))
            self._replace_folder(fresh)
        return before - after

    def clear(self) -> None:
        """Start over with an empty database; other processes move on to it at their next use."""
        with self._exclusive():
            self._replace_folder(None)

    @property
    def _data_file(self) -> Path:
        return self.root / _LAYOUT / "latents.sqlite"

    @contextlib.contextmanager
    def _begin(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction; damage of the file replaces it."""
        with self._exclusive(), self._replacing_damage(), self._transaction(write) as connection:
            yield connection

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other threads and processes out, and the process from forking.

        Raises:
            TimeoutError: Another process has held the lock for `LOCK_TIMEOUT_S`.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        with self._lock, (self.root / "lock").open("a") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"another process has held {stream.name} for {LOCK_TIMEOUT_S} s") from None
                    time.sleep(0.001)
            yield

    @contextlib.contextmanager
    def _replacing_damage(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not _is_damage(error):
                raise
            self._start_over(error)
            raise _DamageError(str(error)) from None

    @contextlib.contextmanager
    def _transaction(self, write: bool) -> Iterator[sqlite3.Connection]:
        connection = self._opened()
        with connection:  # commits, or rolls back after any error
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection

    def _opened(self) -> sqlite3.Connection:
        """The open connection; opens it first, and again after another process replaced the database."""
        if self._connection is not None and self._data_file.exists() and self._data_file.stat().st_ino == self._inode:
            return self._connection
        self._close()
        for leftover in self.root.glob(_TRASH + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            return self._open()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not _is_damage(error):
                raise
            self._start_over(error)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        self._data_file.parent.mkdir(exist_ok=True)
        connection = sqlite3.connect(self._data_file, isolation_level=None, check_same_thread=False)
        try:
            # The journal file stays, so that a write only syncs; secure_delete would overwrite what is evicted.
            for setting in (
                f"page_size={_PAGE_BYTES}", "journal_mode=TRUNCATE", "synchronous=NORMAL", "secure_delete=OFF",
                "cell_size_check=ON", "trusted_schema=OFF",
            ):  # fmt: skip
                connection.execute(f"PRAGMA {setting}").fetchall()
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        self._connection, self._inode = connection, self._data_file.stat().st_ino
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

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


class _DamageError(sqlite3.DatabaseError):
    """Damage that SQLite does not notice by itself."""


def _is_damage(error: Exception) -> bool:
    if isinstance(error, (_DamageError, UnicodeDecodeError)):  # SQLite's message may cite damaged text
        return True
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE_CODES


def _find(connection: sqlite3.Connection, key: bytes) -> int | None:
    row = connection.execute("SELECT id FROM entries WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])


def _read(connection: sqlite3.Connection, key: bytes) -> bytearray | None:
    found = _find(connection, key)
    if found is None:
        return None
    # A blob handle copies once where SELECT copies twice: half the time for the latents of a window.
    with connection.blobopen("latents", "value", found, readonly=True) as blob:
        return bytearray(blob.read())


def _used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of the pages in use; those of deleted entries are free at once."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return int(pages - free) * _PAGE_BYTES


def _disk_bytes(value: bytes) -> int:
    """What a value takes at most, with its entry and some pages by which the search trees may grow."""
    return (-(-len(value) // (_PAGE_BYTES - 4)) + 4) * _PAGE_BYTES


def _evict(connection: sqlite3.Connection, target_bytes: int) -> int:
    """Delete entries, the least recently used first, until `target_bytes` are in use; returns what is in use."""
    while (used := _used_bytes(connection)) > target_bytes:
        oldest = connection.execute("SELECT id FROM entries ORDER BY last_use, id LIMIT 1").fetchone()
        if oldest is None:
            if used > _EMPTY_BYTES:
                raise _DamageError(f"{used} bytes belong to no entry")
            break
        _delete(connection, [oldest[0]])
    return used


def _delete(connection: sqlite3.Connection, ids: Collection[int]) -> None:
    for table in ("entries", "latents"):
        deleted = connection.executemany(f"DELETE FROM {table} WHERE id = ?", ((entry,) for entry in ids))
        if deleted.rowcount != len(ids):
            raise _DamageError(f"{table} lacks entries of its index")


def _before_fork() -> None:
    """Wait for running transactions and close: a connection must not live on in a child."""
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
