"""What a corpus holds, where its latents are, and the shards that are missing. Knows no torch.

    with new_index(source) as index:
        index.scan()
        index.add_shards(output.shards())                 # what earlier runs left
        for documents in index.missing_shards(shard_bytes=1 << 20): …
        index.write("out/index.sqlite", chunk_size=4)     # whole or not at all

All is in a temporary SQLite database without a name, which ends with the process, however that ends: a million
documents need no more memory than ten.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from utils.corpus.source import Document, Problem, Source
from utils.errors import DatasetError
from utils.files import atomic_path

INDEX_FILE = "index.sqlite"
SKIPPED_FILE = "skipped.jsonl"
# Keeps a shard's table of documents small.
MAX_DOCUMENTS = 4096

# What an encoded corpus holds: documents, those without a token, those that are not encoded (the run's log says why),
# encoder tokens, latents, and the shards that hold them.
COUNTS = ("documents", "empty", "missing", "memory_tokens", "num_latents", "shards")

# (id, sha256, first row, rows, tokens, checksum) of a document in a shard
Record: TypeAlias = tuple[str, str, int, int, int, int]
T = TypeVar("T")

_WORKING_TABLES = """
PRAGMA journal_mode=OFF;
CREATE TABLE found (id TEXT PRIMARY KEY, sha256 TEXT, text_bytes INT, offset INT, size INT, line INT);
CREATE TABLE problems (place TEXT, reason TEXT, is_text INT);
CREATE TABLE stored (
    id TEXT, sha256 TEXT, first_row INT, num_latents INT, num_tokens INT, checksum INT, shard TEXT,
    PRIMARY KEY (id, sha256)
) WITHOUT ROWID;
-- An empty text has no latents and needs no shard.
CREATE VIEW encoded AS
    SELECT id, line, sha256, IFNULL(num_tokens, 0) AS num_tokens, IFNULL(num_latents, 0) AS num_latents,
        IFNULL(shard, '') AS shard, IFNULL(first_row, 0) AS first_row, IFNULL(checksum, 0) AS checksum
    FROM found LEFT JOIN stored USING (id, sha256) WHERE shard IS NOT NULL OR text_bytes = 0;
"""
_INDEX_TABLES = """
PRAGMA written.journal_mode=OFF;
PRAGMA written.synchronous=OFF;
CREATE TABLE written.documents (
    position INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, num_tokens INT, num_latents INT, shard TEXT, first_row INT,
    stop_row INT, chunk_size INT, sha256 TEXT, checksum INT
);
CREATE INDEX written.texts ON documents (sha256);
CREATE TABLE written.problems (place TEXT, reason TEXT);
CREATE TABLE written.about (name TEXT PRIMARY KEY, value);
"""


class CorpusIndex:
    """The index while a run makes it; open it with `new_index`."""

    def __init__(self, db: sqlite3.Connection, source: Source) -> None:
        self.num_duplicates = 0
        self._db = db
        self._source = source

    def scan(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Read the whole corpus once: ids, hashes, sizes, problems.

        Args:
            progress: Called with the bytes of each text.
        """
        with self._transaction():
            for found in self._source.scan():
                if isinstance(found, Problem):
                    self._add_problem(found)
                    continue
                try:
                    self._db.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", astuple(found))
                except sqlite3.IntegrityError:
                    self.num_duplicates += 1
                    line = self._value("SELECT line FROM found WHERE id = ?", found.id)
                    reason = f"its id {found.id!r} is line {line}'s already"
                    self._add_problem(Problem(place=f"line {found.line}", reason=reason))
                progress(found.text_bytes)

    def add_shards(self, shards: Iterable[tuple[str, Iterable[Record]]]) -> None:
        """Note the documents of shards on disk; of one that two hold, the first counts."""
        rows = ((*record, name) for name, records in shards for record in records)
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO stored VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    @property
    def num_documents(self) -> int:
        """Documents that can be encoded, empty ones included."""
        return int(self._value("SELECT COUNT(*) FROM found"))

    @property
    def num_problems(self) -> int:
        """How many things cannot be encoded."""
        return int(self._value("SELECT COUNT(*) FROM problems"))

    @property
    def num_texts_with_problems(self) -> int:
        """How many of these are texts, and not files of another kind."""
        return int(self._value("SELECT COUNT(*) FROM problems WHERE is_text"))

    @property
    def missing_bytes(self) -> int:
        """Text that no shard holds, as UTF-8."""
        query = "SELECT IFNULL(SUM(text_bytes), 0) FROM found LEFT JOIN stored USING (id, sha256) WHERE shard IS NULL"
        return int(self._value(query))

    def problems(self, limit: int = -1) -> Iterator[Problem]:
        """What cannot be encoded: texts, then other files, each in the order in which it was met."""
        query = "SELECT * FROM problems ORDER BY is_text DESC, rowid LIMIT ?"
        for place, reason, is_text in self._db.execute(query, (limit,)):
            yield Problem(place=place, reason=reason, is_text=bool(is_text))

    def missing_shards(self, shard_bytes: int) -> Iterator[list[Document]]:
        """The documents of each shard that is to be made; see `cut`."""
        rows = self._db.execute(
            "SELECT found.*, shard IS NOT NULL FROM found LEFT JOIN stored USING (id, sha256) WHERE text_bytes > 0 "
            f"ORDER BY found.{self._source.ordered_by}"
        )
        names = [field.name for field in fields(Document)]
        return cut(((Document(**dict(zip(names, row[:-1], strict=True))), bool(row[-1])) for row in rows), shard_bytes)

    def unused_shards(self) -> list[str]:
        """Shards of which no document is part of the corpus any more."""
        query = "SELECT shard FROM stored LEFT JOIN found USING (id, sha256) GROUP BY shard HAVING COUNT(line) = 0"
        return [shard for (shard,) in self._db.execute(query)]

    @cached_property
    def corpus_sha256(self) -> str:
        """Hex sha256 over ids and texts in order: equal for equal corpora."""
        digest = hashlib.sha256()
        for id, sha256 in self._db.execute(f"SELECT id, sha256 FROM found ORDER BY {self._source.ordered_by}"):
            digest.update(f"{id}\0{sha256}\n".encode())
        return digest.hexdigest()

    def written_counts(self, path: Path) -> dict[str, int] | None:
        """The `COUNTS` of an index on disk; None where it does not describe this corpus, whole."""
        try:
            with contextlib.closing(open_read_only(path)) as db:
                known = dict(db.execute("SELECT name, value FROM about"))
                shards = [name for (name,) in db.execute("SELECT DISTINCT shard FROM documents WHERE num_latents > 0")]
        except sqlite3.Error:
            return None  # there is none, or a damaged one: it is made anew, from the shards
        state = [known.get(name) for name in ("corpus_sha256", "problems", "missing")]
        whole = state == [self.corpus_sha256, self.num_problems, 0] and set(COUNTS) <= known.keys()
        if not whole or not all((path.parent / name).is_file() for name in shards):
            return None
        return {name: known[name] for name in COUNTS}

    def write(self, path: Path, chunk_size: int) -> dict[str, int]:
        """Write the index of what is encoded, which replaces an older one once it is whole; returns its `COUNTS`."""
        with explain_database(path), atomic_path(path) as temporary:
            self._db.execute("ATTACH ? AS written", (str(temporary),))
            try:
                self._db.executescript(_INDEX_TABLES)
                return self._fill(chunk_size)
            finally:
                self._db.execute("DETACH written")

    def _fill(self, chunk_size: int) -> dict[str, int]:
        self._db.execute(
            f"INSERT INTO written.documents SELECT ROW_NUMBER() OVER (ORDER BY {self._source.ordered_by}) - 1, id, "
            "num_tokens, num_latents, shard, first_row, first_row + num_latents, ?, sha256, checksum FROM encoded",
            (chunk_size,),
        )
        self._db.execute("INSERT INTO written.problems SELECT place, reason FROM main.problems")
        values = self._db.execute(
            "SELECT COUNT(*), IFNULL(SUM(num_tokens = 0), 0), (SELECT COUNT(*) FROM found) - COUNT(*), "
            "IFNULL(SUM(num_tokens), 0), IFNULL(SUM(num_latents), 0), "
            "COUNT(DISTINCT CASE WHEN num_latents > 0 THEN shard END) FROM written.documents"
        ).fetchone()
        counts = dict(zip(COUNTS, values, strict=True))
        about = {**counts, "corpus_sha256": self.corpus_sha256, "problems": self.num_problems}
        self._db.executemany("INSERT INTO written.about VALUES (?, ?)", about.items())
        return counts

    def _add_problem(self, problem: Problem) -> None:
        self._db.execute("INSERT INTO problems VALUES (?, ?, ?)", astuple(problem))

    def _value(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()[0]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One for many rows: a commit a row would cost more than reading the corpus."""
        self._db.execute("BEGIN")
        yield
        self._db.execute("COMMIT")


@contextlib.contextmanager
def new_index(source: Source) -> Iterator[CorpusIndex]:
    """Begin an index; SQLite's errors within the block are ours.

    Raises:
        DatasetError: The disk is full, ….
    """
    with (
        explain_database("SQLite's temporary file"),
        # Shards are listed by the thread that reads ahead; two threads never use it at once.
        contextlib.closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as db,
    ):
        db.executescript(_WORKING_TABLES)
        yield CorpusIndex(db, source)


def cut(documents: Iterable[tuple[Document, bool]], shard_bytes: int) -> Iterator[list[Document]]:
    """Cut a corpus into shards, and leave out what is stored.

    Where shards begin depends on the corpus alone, not on what is stored: after a crash the same documents are batched
    together again and give the same bits. What is new in shards that are stored in part is joined.

    Args:
        documents: All of the corpus that have text, in its order, and whether each is stored.
        shard_bytes: Most text of a shard, UTF-8; one larger document is a shard of its own.

    Yields:
        The documents of one shard.
    """
    joined: list[Document] = []
    for group in in_groups(documents, lambda pair: pair[0].text_bytes, shard_bytes):
        new = [document for document, is_stored in group if not is_stored]
        if len(new) == len(group):
            yield new
        elif new:
            *full, joined = in_groups([*joined, *new], lambda document: document.text_bytes, shard_bytes)
            yield from full
    if joined:
        yield joined


def in_groups(items: Iterable[T], size: Callable[[T], int], limit: int, most: int = MAX_DOCUMENTS) -> Iterator[list[T]]:
    """Neighbours whose sizes together keep to a limit, and at most so many; a larger item is a group of its own."""
    group: list[T] = []
    used = 0
    for item in items:
        if group and (used + size(item) > limit or len(group) >= most):
            yield group
            group, used = [], 0
        group.append(item)
        used += size(item)
    if group:
        yield group


def open_read_only(path: Path) -> sqlite3.Connection:
    """A database that nobody writes any more, for any number of processes and without locks."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


@contextlib.contextmanager
def explain_database(path: Path | str) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise DatasetError(
            f"{path} cannot be used ({error}): what is encoded is kept; make room, or check the disk, and run the same "
            "command again"
        ) from None
