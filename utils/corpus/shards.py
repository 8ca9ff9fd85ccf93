"""The output folder and its shards: many documents' latents, end to end in files that appear whole or not at all.

    output = CorpusOutput(root=Path("out"), settings=settings)
    with output.locked():                                     # corpus.json is this run's, or an error
        output.begin()
        with new_shard(output.root, documents, output.about) as shard:
            shard.add(document, latents_ND, num_tokens)
    for name, records in output.shards(): …

A shard's one tensor is `latents` [N, D]. The header's metadata names the documents and their rows, so that a shard
explains itself and a run that was killed needs nothing else to resume. Rows are written as they come: a shard takes no
memory. Shape legend: n latents of a document, N of a shard, D decoder width.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from utils.checkpoint.layout import CheckpointFiles
from utils.corpus.index import INDEX_FILE, SKIPPED_FILE, Record
from utils.corpus.source import Document, Source
from utils.errors import ConfigError, DatasetError
from utils.files import atomic_path, provenance, read_json, sha256_bytes, write_json
from utils.locks import remove_leftovers, sole_writer

ABOUT_FILE = "corpus.json"
VERSION = 2
_SHARDS = "latents-*.safetensors"
TENSOR_NAME = "latents"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A number of this many digits stands for each one that is not known when the header's room is measured.
_ANY_NUMBER = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOutput:
    """An output folder.

    Attributes:
        root: The folder.
        settings: What decides the documents and their latents, as JSON values; the folder keeps to them.
    """

    root: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, root: Path, source: Source, files: CheckpointFiles, dtype: str) -> CorpusOutput:
        """The folder of a corpus and a checkpoint, with the encoder in a dtype."""
        settings = {
            # Not which files are taken: more or fewer of them are the same corpus, grown or shrunk.
            "corpus": source.place,
            "fields": [getattr(source, name, None) for name in ("text_field", "id_field")],
            "fingerprint": files.fingerprint,
            "chunk_size": files.config.chunk_size,
            "dtype": dtype,
        }
        return cls(root=root, settings=settings)

    @property
    def about(self) -> dict[str, str]:
        """The metadata of every shard: a fingerprint of the settings, and the chunk size for people."""
        text = json.dumps(self.settings, sort_keys=True)
        return {"settings": sha256_bytes(text.encode()), "chunk_size": str(self.settings["chunk_size"])}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Begin or continue the folder, and keep other runs out of it.

        Raises:
            ConfigError: It holds something else, was made with other settings, or another run writes it now.
        """
        _refuse_foreign(self.root)
        with sole_writer(self.root) as held:
            self._compare()
            if held:
                remove_leftovers(self.root, _SHARDS, ABOUT_FILE, INDEX_FILE, SKIPPED_FILE)
            yield

    def begin(self) -> None:
        """Write the settings of a new run; from now on the folder is this corpus's."""
        path = self.root / ABOUT_FILE
        if not path.is_file():
            write_json(path, {"version": VERSION, "settings": self.settings, "provenance": provenance()})

    def shards(self) -> Iterator[tuple[str, list[Record]]]:
        """The file name of each shard on disk, and its documents."""
        about = self.about
        for path in sorted(self.root.glob(_SHARDS)):
            yield path.name, read_records(path, about)

    def _compare(self) -> None:
        """Refuse other settings than those of an earlier run."""
        path = self.root / ABOUT_FILE
        if not path.is_file():
            return
        known = read_json(path)
        old = known.get("settings") if isinstance(known, dict) and known.get("version") == VERSION else None
        if not isinstance(old, dict):
            raise DatasetError(f"{path} is not this command's (version {VERSION}): give another --output")
        new = json.loads(json.dumps(self.settings))
        different = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in new if old.get(name) != new[name]]
        if different or set(old) != set(new):
            raise ConfigError(
                f"{self.root} was made with other settings: {'; '.join(different) or 'other keys'}: use those, or give "
                "another --output"
            )


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


class Shard:
    """A shard while it is written."""

    def __init__(self, stream: IO[bytes], documents: Sequence[Document], about: Mapping[str, str]) -> None:
        self._stream = stream
        self._about = dict(about)
        self._dtype, self._width, self._num_rows = torch.bfloat16, 0, 0
        self.records: list[Record] = []
        number = _ANY_NUMBER
        longest = [(x.id, x.sha256, number, number, number, number) for x in documents]
        # The rows begin on a multiple of 8 bytes, as readers that map the file want it.
        self._header_bytes = -(-len(self._header(longest, number, number)) // 8) * 8
        stream.seek(8 + self._header_bytes)

    def add(self, document: Document, latents_ND: torch.Tensor | None, num_tokens: int) -> None:
        """Write the rows of the next document.

        Args:
            document: Whose they are.
            latents_ND: Float tensor [n, D] on the CPU, of one dtype and D in the whole shard; None for no rows.
            num_tokens: Encoder tokens that they stand for.
        """
        count = 0
        if latents_ND is not None:
            count = len(latents_ND)
            self._dtype, self._width = latents_ND.dtype, latents_ND.shape[1]
            self._stream.write(_bytes_of(latents_ND))
        check = checksum(document.id, document.sha256, num_tokens, latents_ND)
        self.records.append((document.id, document.sha256, self._num_rows, count, num_tokens, check))
        self._num_rows += count

    def finish(self) -> None:
        """Write the header into the room that was left for it."""
        self._stream.seek(0)
        header = self._header(self.records, self._num_rows, self._width)
        assert len(header) <= self._header_bytes, (len(header), self._header_bytes)
        # The format allows spaces behind the header's JSON.
        self._stream.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))

    def _header(self, records: Sequence[Record], num_rows: int, width: int) -> bytes:
        tensor = {
            "dtype": _NAMES[self._dtype],
            "shape": [num_rows, width],
            "data_offsets": [0, num_rows * width * self._dtype.itemsize],
        }
        metadata = {**self._about, "documents": json.dumps(records, ensure_ascii=False)}
        return json.dumps({"__metadata__": metadata, TENSOR_NAME: tensor}, ensure_ascii=False).encode()


def checksum(id: str, sha256: str, num_tokens: int, latents_ND: torch.Tensor | None) -> int:
    """CRC-32 of a document's rows (None for no rows) and of what is noted about it: a disk's error is no latent."""
    about = zlib.crc32(f"{id}\0{sha256}\0{num_tokens}".encode())
    return about if latents_ND is None else zlib.crc32(_bytes_of(latents_ND), about)


def _bytes_of(latents_ND: torch.Tensor) -> memoryview:
    return latents_ND.contiguous().view(torch.uint8).numpy().data


def shard_name(documents: Sequence[Document]) -> str:
    """File name of the shard that holds these documents: the same for the same texts, so that none is written twice."""
    lines = "".join(f"{document.id}\0{document.sha256}\n" for document in documents)
    return f"latents-{sha256_bytes(lines.encode())[:16]}.safetensors"


@contextlib.contextmanager
def new_shard(folder: Path, documents: Sequence[Document], about: Mapping[str, str]) -> Iterator[Shard]:
    """Write the shard of some documents; without rows of any of them none appears.

    Args:
        folder: Where it goes.
        documents: What may be added, in this order.
        about: Metadata of the run.

    Raises:
        DatasetError: The shard cannot be written: the disk is full, ….
    """
    path = folder / shard_name(documents)
    try:
        with contextlib.suppress(_NothingToWrite), atomic_path(path) as temporary:
            with temporary.open("wb") as stream:
                shard = Shard(stream, documents, about)
                yield shard
                shard.finish()
            if not shard.records:
                raise _NothingToWrite
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written ({error.strerror}): the shards before it are kept; make room and run the same "
            "command again"
        ) from None


def read_records(path: Path, about: Mapping[str, str]) -> list[Record]:
    """The documents of a shard.

    Args:
        path: The shard.
        about: Metadata that it must have.

    Raises:
        DatasetError: It is damaged, or of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            num_rows = file.get_slice(TENSOR_NAME).get_shape()[0]
        records = [_record(values, num_rows) for values in json.loads(metadata["documents"])]
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not a whole shard ({error}): remove it and run the same command again") from None
    for key, value in about.items():
        if metadata.get(key) != value:
            raise DatasetError(f"{path} is of another run ({key} is {metadata.get(key)}, not {value}): remove it")
    return records


def _record(values: Any, num_rows: int) -> Record:
    """One entry of a header, checked."""
    id, sha256, first_row, rows, num_tokens, check = values
    texts, numbers = (id, sha256), (first_row, rows, num_tokens, check)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("an entry of its list of documents has other values")
    if not (0 <= first_row <= first_row + rows <= num_rows and 0 <= num_tokens <= _ANY_NUMBER):
        raise ValueError(f"it has {num_rows} rows, an entry names others")
    return id, sha256, first_row, rows, num_tokens, check


class _NothingToWrite(Exception):
    """Ends a shard without a document."""
