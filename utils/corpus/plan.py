"""What is in a corpus, what of it is already encoded, and how the rest is cut into parcels of work. Knows no torch.

    with CorpusPlan.create("out/.plan.sqlite") as plan:
        plan.scan(source)
        plan.add_finished(rows)                   # what earlier runs left
        plan.cut(shard_bytes=1 << 20)
    documents = parcel_documents("out/.plan.sqlite", 0)      # in any process

The plan is an SQLite file, so that a million documents need no more memory than ten. It lives as long as the run; a new
run makes a new one. A parcel is a run of neighbours in the corpus. Where parcels begin depends on the corpus alone, not
on what is finished: after a crash the same documents are batched together again and give the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from utils.corpus.source import Document, Problem, Source
from utils.errors import DatasetError

# Of one parcel; keeps a shard's table of documents small.
MAX_DOCUMENTS = 4096

_TABLES = """
CREATE TABLE found (id TEXT PRIMARY KEY, sha256 TEXT, text_bytes INT, offset INT, size INT, line INT);
CREATE TABLE problems (place TEXT, reason TEXT);
CREATE TABLE finished (
    id TEXT, sha256 TEXT, shard TEXT, first_row INT, num_latents INT, num_tokens INT, PRIMARY KEY (id, sha256)
) WITHOUT ROWID;
CREATE TABLE work (parcel INT, id TEXT, sha256 TEXT, text_bytes INT, offset INT, size INT, line INT);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedDocument:
    """A document whose latents are on disk.

    Attributes:
        id: As in `Document`.
        sha256: As in `Document`.
        shard: File name of its shard.
        first_row: Its first latent in the shard.
        num_latents: Its latents.
        num_tokens: Its encoder tokens.
    """

    id: str
    sha256: str
    shard: str
    first_row: int
    num_latents: int
    num_tokens: int


class CorpusPlan:
    """The plan while it is made and when its result is collected; one process has it open."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.num_duplicates = 0
        self._db = connection

    @classmethod
    def create(cls, path: Path) -> CorpusPlan:
        """Begin an empty plan in place of an old one."""
        path.unlink(missing_ok=True)
        with explain_database(path):
            # A plan that a crash damages is made anew: no journal, no waiting for the disk.
            connection = sqlite3.connect(path, isolation_level=None)
            connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + _TABLES)
        return cls(path, connection)

    def __enter__(self) -> CorpusPlan:
        return self

    def __exit__(self, *_: object) -> None:
        """Close and remove the file."""
        self._db.close()
        self.path.unlink(missing_ok=True)

    def scan(self, source: Source, progress: Callable[[int], object] = lambda _: None) -> None:
        """Read the whole corpus once: ids, hashes, sizes, problems.

        Args:
            source: Its documents.
            progress: Called with the bytes of each text.
        """
        self._order = source.ordered_by
        with self._writing():
            for found in source.scan():
                if isinstance(found, Problem):
                    self._add_problem(found)
                    continue
                try:
                    self._db.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", astuple(found))
                except sqlite3.IntegrityError:
                    self.num_duplicates += 1
                    (line,) = self._one("SELECT line FROM found WHERE id = ?", found.id)
                    self._add_problem(
                        Problem(place=f"line {found.line}", reason=f"its id {found.id!r} is line {line}'s already")
                    )
                progress(found.text_bytes)

    def problems(self, limit: int = -1) -> Iterator[Problem]:
        """What cannot be encoded, in the order in which it was met."""
        for place, reason in self._all("SELECT place, reason FROM problems LIMIT ?", limit):
            yield Problem(place=place, reason=reason)

    @property
    def num_problems(self) -> int:
        """How many things cannot be encoded."""
        return int(self._one("SELECT COUNT(*) FROM problems")[0])

    @property
    def num_documents(self) -> int:
        """Documents that can be encoded, empty ones included."""
        return int(self._one("SELECT COUNT(*) FROM found")[0])

    def add_finished(self, documents: Iterable[FinishedDocument]) -> None:
        """Note documents that are on disk; of equal ones the first is kept."""
        with self._writing():
            for document in documents:
                self._db.execute("INSERT OR IGNORE INTO finished VALUES (?, ?, ?, ?, ?, ?)", astuple(document))

    def cut(self, parcel_bytes: int) -> tuple[int, int]:
        """Cut what is to be encoded into parcels; the largest get the smallest numbers, so that they begin first.

        Args:
            parcel_bytes: Most text of a parcel, UTF-8; one larger document is a parcel of its own.

        Returns:
            How many parcels, and the bytes of text in them.
        """
        cutter = _Cutter(self._db, parcel_bytes)
        with self._writing():
            for *fields, finished in self._all(
                "SELECT found.*, finished.id IS NOT NULL FROM found LEFT JOIN finished USING (id, sha256) "
                f"ORDER BY found.{self._order}"
            ):
                cutter.add(Document(**dict(zip(_FIELDS, fields, strict=True))), bool(finished))
            cutter.finish()
            self._db.execute(
                "CREATE TABLE parcels AS SELECT ROW_NUMBER() OVER (ORDER BY SUM(text_bytes) DESC, parcel) - 1 AS "
                "number, parcel FROM work GROUP BY parcel"
            )
            self._db.execute("CREATE INDEX parcel_numbers ON parcels (number)")
            self._db.execute("CREATE INDEX work_parcels ON work (parcel)")
        (parcels,) = self._one("SELECT COUNT(*) FROM parcels")
        (text_bytes,) = self._one("SELECT COALESCE(SUM(text_bytes), 0) FROM work")
        return int(parcels), int(text_bytes)

    def encoded(self) -> Iterator[tuple[Document, FinishedDocument | None]]:
        """Every document in the corpus's order, and where its latents are; None: nowhere."""
        rows = self._all(
            f"SELECT found.*, finished.* FROM found LEFT JOIN finished USING (id, sha256) ORDER BY found.{self._order}"
        )
        for row in rows:
            document = Document(**dict(zip(_FIELDS, row[:6], strict=True)))
            if row[6] is not None:
                names = ("id", "sha256", "shard", "first_row", "num_latents", "num_tokens")
                yield document, FinishedDocument(**dict(zip(names, row[6:], strict=True)))
            else:
                yield document, empty_document(document) if not document.text_bytes else None

    def corpus_sha256(self) -> str:
        """Hex sha256 over ids and texts in order: equal for equal corpora."""
        digest = hashlib.sha256()
        for id, sha256 in self._all(f"SELECT id, sha256 FROM found ORDER BY {self._order}"):
            digest.update(f"{id}\0{sha256}\n".encode())
        return digest.hexdigest()

    def unused_shards(self) -> list[str]:
        """Shards of which no document is part of the corpus any more."""
        rows = self._all(
            "SELECT shard FROM finished LEFT JOIN found USING (id, sha256) GROUP BY shard HAVING COUNT(found.id) = 0"
        )
        return [shard for (shard,) in rows]

    def _add_problem(self, problem: Problem) -> None:
        self._db.execute("INSERT INTO problems VALUES (?, ?)", astuple(problem))

    def _one(self, query: str, *values: Any) -> Any:
        with explain_database(self.path):
            return self._db.execute(query, values).fetchone()

    def _all(self, query: str, *values: Any) -> Iterator[Any]:
        with explain_database(self.path):
            yield from self._db.execute(query, values)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: a commit a row would cost more than reading the corpus."""
        with explain_database(self.path):
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")


_FIELDS = ("id", "sha256", "text_bytes", "offset", "size", "line")


class _Cutter:
    """Cuts the corpus at fixed places; parcels that are finished in part are joined again from what is left of them."""

    def __init__(self, db: sqlite3.Connection, parcel_bytes: int) -> None:
        self._db = db
        self._run = _Run(parcel_bytes)
        self._left_over = _Run(parcel_bytes)
        self._untouched = True
        self._parcels = 0

    def add(self, document: Document, finished: bool) -> None:
        if self._run.is_full(document):
            self._close()
        self._run.add(document, kept=not finished and document.text_bytes > 0)
        self._untouched &= not finished

    def finish(self) -> None:
        self._close()
        self._write(self._left_over.take())

    def _close(self) -> None:
        documents, untouched, self._untouched = self._run.take(), self._untouched, True
        if untouched:
            self._write(documents)
            return
        for document in documents:
            if self._left_over.is_full(document):
                self._write(self._left_over.take())
            self._left_over.add(document)

    def _write(self, documents: list[Document]) -> None:
        if documents:
            rows = ((self._parcels, *astuple(document)) for document in documents)
            self._db.executemany("INSERT INTO work VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._parcels += 1


class _Run:
    """Neighbours that grow to the size of a parcel."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.take()

    def is_full(self, document: Document) -> bool:
        too_large = self._text_bytes + document.text_bytes > self._limit_bytes
        return self._count > 0 and (too_large or self._count >= MAX_DOCUMENTS)

    def add(self, document: Document, kept: bool = True) -> None:
        """Count a document; one that is not kept takes its room all the same."""
        self._count += 1
        self._text_bytes += document.text_bytes
        if kept:
            self._kept.append(document)

    def take(self) -> list[Document]:
        kept = getattr(self, "_kept", [])
        self._kept: list[Document] = []
        self._count = self._text_bytes = 0
        return kept


def parcel_documents(path: Path, number: int) -> list[Document]:
    """The documents of one parcel, in the corpus's order; any process may ask once the plan is cut."""
    with explain_database(path), contextlib.closing(open_read_only(path)) as db:
        rows = db.execute(
            "SELECT work.id, sha256, text_bytes, offset, size, line FROM parcels JOIN work USING (parcel) "
            "WHERE number = ? ORDER BY work.rowid",
            (number,),
        )
        return [Document(**dict(zip(_FIELDS, row, strict=True))) for row in rows]


def empty_document(document: Document) -> FinishedDocument:
    """An empty text has no latents and needs no shard."""
    return FinishedDocument(id=document.id, sha256=document.sha256, shard="", first_row=0, num_latents=0, num_tokens=0)


def open_read_only(path: Path) -> sqlite3.Connection:
    """A database that nobody writes any more, for any number of processes and without locks."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


@contextlib.contextmanager
def explain_database(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise DatasetError(
            f"{path} cannot be used ({error}): what is encoded is kept; make room, or check the disk, and run the same "
            "command again"
        ) from None
