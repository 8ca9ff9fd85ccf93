"""The folder of an encoded corpus: what it was made with, its shards, its index. Knows no torch at the top.

    corpus.json          settings and provenance, written first
    latents-*.safetensors                the shards
    index.sqlite         one row a document: id, tokens, latents, shard, rows, chunk size, hash; written last

The shards are the truth, the index is made from them. One run at a time may write a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.corpus.plan import CorpusPlan, FinishedDocument, explain_database, open_read_only
from utils.errors import ConfigError, DatasetError
from utils.files import atomic_path, provenance, read_json, write_json
from utils.locks import remove_leftovers, sole_writer

ABOUT_FILE = "corpus.json"
INDEX_FILE = "index.sqlite"
SKIPPED_FILE = "skipped.jsonl"
PLAN_FILE = ".plan.sqlite"
VERSION = 1

_TABLES = """
CREATE TABLE documents (
    position INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, num_tokens INT, num_latents INT, shard TEXT, first_row INT,
    stop_row INT, chunk_size INT, sha256 TEXT
);
CREATE INDEX texts ON documents (sha256);
CREATE TABLE problems (place TEXT, reason TEXT);
CREATE TABLE about (name TEXT PRIMARY KEY, value);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusCounts:
    """What an encoded corpus holds.

    Attributes:
        documents: Documents in the index, empty ones included.
        empty: Documents without a token, which have no latents.
        missing: Documents of the corpus that are not encoded; the run's log says why.
        memory_tokens: Encoder tokens of all.
        num_latents: Latents of all.
        shards: Shards that hold them.
    """

    documents: int = 0
    empty: int = 0
    missing: int = 0
    memory_tokens: int = 0
    num_latents: int = 0
    shards: int = 0


class CorpusOutput:
    """An output folder that this process writes; make it with `opened`."""

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.root = root
        self.settings = dict(settings)

    @property
    def about(self) -> dict[str, str]:
        """What every shard's metadata says of the run."""
        return about_shards(self.settings)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, root: str | Path, settings: Mapping[str, Any]) -> Iterator[CorpusOutput]:
        """Begin or continue a folder, and keep other runs out of it.

        Args:
            root: The folder.
            settings: What decides the documents and their latents, as JSON values.

        Raises:
            ConfigError: It holds something else, was made with other settings, or another run writes it now.
        """
        folder = Path(root)
        _refuse_foreign(folder)
        with sole_writer(folder) as held:
            _compare(folder, settings)
            if held:
                remove_leftovers(folder, "latents-*.safetensors", ABOUT_FILE, INDEX_FILE, SKIPPED_FILE)
            yield cls(folder, settings)

    def begin(self) -> None:
        """Write the settings of a new run; from now on the folder is this corpus's."""
        path = self.root / ABOUT_FILE
        if not path.is_file():
            write_json(path, {"version": VERSION, "settings": self.settings, "provenance": provenance()})

    def finished(self) -> Iterator[FinishedDocument]:
        """The documents of all shards on disk."""
        from utils.corpus.shards import shard_documents

        for path in sorted(self.root.glob("latents-*.safetensors")):
            yield from shard_documents(path, self.about)

    def is_complete(self, plan: CorpusPlan) -> bool:
        """Whether the index describes this corpus and was complete."""
        path = self.root / INDEX_FILE
        if not path.is_file():
            return False
        try:
            with contextlib.closing(open_read_only(path)) as db:
                known = dict(db.execute("SELECT name, value FROM about"))
                shards = [name for (name,) in db.execute("SELECT DISTINCT shard FROM documents WHERE num_latents > 0")]
        except sqlite3.Error:
            # Damaged: it is made anew, from the shards.
            return False
        if not all((self.root / name).is_file() for name in shards) or not set(CorpusCounts.__slots__) <= known.keys():
            return False
        state = (plan.corpus_sha256(), plan.num_problems)
        return (known.get("corpus_sha256"), known.get("problems")) == state and not known.get("missing")

    def write_index(self, plan: CorpusPlan) -> CorpusCounts:
        """Write the index of what the plan found encoded; it replaces an older one once it is whole."""
        path = self.root / INDEX_FILE
        with (
            explain_database(path),
            atomic_path(path) as temporary,
            contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as db,
        ):
            db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + _TABLES)
            db.execute("BEGIN")
            counts = _fill(db, plan, int(self.settings["chunk_size"]))
            db.execute("COMMIT")
        return counts

    def read_counts(self) -> CorpusCounts:
        """What the index says it holds."""
        with explain_database(self.root / INDEX_FILE), contextlib.closing(open_read_only(self.root / INDEX_FILE)) as db:
            known = dict(db.execute("SELECT name, value FROM about"))
        return CorpusCounts(**{name: known[name] for name in CorpusCounts.__slots__})

    def prune(self, plan: CorpusPlan) -> list[str]:
        """Remove the shards that hold nothing of the corpus any more; returns their names."""
        names = plan.unused_shards()
        for name in names:
            (self.root / name).unlink(missing_ok=True)
        return names


def about_shards(settings: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of every shard of a run: a fingerprint of its settings, and its chunk size for people."""
    text = json.dumps(settings, sort_keys=True)
    return {"settings": hashlib.sha256(text.encode()).hexdigest(), "chunk_size": str(settings["chunk_size"])}


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: --output is a folder")
    if folder.is_dir() and not (folder / ABOUT_FILE).is_file():
        # A run that was killed before its first file leaves no more than its lock.
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise ConfigError(
                f"{folder} holds other files ({others[0]}, {len(others)} in all): give an empty or new --output"
            )


def _compare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse other settings than those of an earlier run."""
    path = folder / ABOUT_FILE
    if not path.is_file():
        return
    known = read_json(path)
    if not isinstance(known, dict) or not isinstance(known.get("settings"), dict) or known.get("version") != VERSION:
        raise DatasetError(f"{path} is not this command's (version {VERSION}): give another --output")
    old, new = known["settings"], json.loads(json.dumps(settings))
    different = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in new if old.get(name) != new[name]]
    if different or set(old) != set(new):
        raise ConfigError(
            f"{folder} was made with other settings: {'; '.join(different) or 'other keys'}: use those, or give "
            "another --output"
        )


def _fill(db: sqlite3.Connection, plan: CorpusPlan, chunk_size: int) -> CorpusCounts:
    documents = empty = missing = tokens = latents = 0
    shards = set()
    for document, done in plan.encoded():
        if done is None:
            missing += 1
            continue
        rows = (done.first_row, done.first_row + done.num_latents)
        db.execute(
            "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (documents, document.id, done.num_tokens, done.num_latents, done.shard, *rows, chunk_size, done.sha256),
        )
        documents += 1
        empty += not done.num_tokens
        tokens += done.num_tokens
        latents += done.num_latents
        if done.num_latents:
            shards.add(done.shard)
    counts = CorpusCounts(
        documents=documents, empty=empty, missing=missing, memory_tokens=tokens, num_latents=latents, shards=len(shards)
    )
    db.executemany("INSERT INTO problems VALUES (?, ?)", ((x.place, x.reason) for x in plan.problems()))
    state: dict[str, Any] = {name: getattr(counts, name) for name in CorpusCounts.__slots__}
    state |= {"corpus_sha256": plan.corpus_sha256(), "problems": plan.num_problems}
    db.executemany("INSERT INTO about VALUES (?, ?)", state.items())
    return counts
