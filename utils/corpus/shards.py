"""Shards: the latents of many documents, end to end in one safetensors file that appears whole or not at all.

    with new_shard(folder, documents, about) as shard:
        shard.add(document, latents_ND, num_tokens)
    for document in shard_documents(folder / name): …

The one tensor is `latents` [N, D]. The header's metadata names the documents and their rows, so that a shard explains
itself and a run that was killed needs nothing else to go on. Rows are written as they come: a shard takes no memory.
Shape legend: n latents of a document, N of a shard, D decoder width.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from utils.corpus.plan import FinishedDocument
from utils.corpus.source import Document
from utils.errors import DatasetError
from utils.files import atomic_path, sha256_bytes

TENSOR_NAME = "latents"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A number of this many digits stands for each one that is not known when the header's room is measured.
_ANY_NUMBER = 10**15

# (id, sha256, first row, rows, tokens) of a document
Record: TypeAlias = tuple[str, str, int, int, int]


class Shard:
    """A shard while it is written."""

    def __init__(self, stream: IO[bytes], documents: Sequence[Document], about: Mapping[str, str]) -> None:
        self._stream = stream
        self._about = dict(about)
        self._dtype, self._width, self._num_rows = torch.bfloat16, 0, 0
        self.records: list[Record] = []
        longest = [(x.id, x.sha256, _ANY_NUMBER, _ANY_NUMBER, _ANY_NUMBER) for x in documents]
        # The rows begin on a multiple of 8 bytes, as readers that map the file want it.
        self._header_bytes = -(-len(self._header(longest, _ANY_NUMBER, _ANY_NUMBER)) // 8) * 8
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
            self._stream.write(latents_ND.contiguous().view(torch.uint8).numpy().data)
        self.records.append((document.id, document.sha256, self._num_rows, count, num_tokens))
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


def shard_documents(path: Path, about: Mapping[str, str]) -> Iterator[FinishedDocument]:
    """What a shard holds.

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
    for id, sha256, first_row, rows, num_tokens in records:
        yield FinishedDocument(
            id=id, sha256=sha256, shard=path.name, first_row=first_row, num_latents=rows, num_tokens=num_tokens
        )


def _record(values: Any, num_rows: int) -> Record:
    """One entry of a header, checked."""
    id, sha256, first_row, rows, num_tokens = values
    texts, numbers = (id, sha256), (first_row, rows, num_tokens)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("an entry of its list of documents has other values")
    if not (0 <= first_row <= first_row + rows <= num_rows and 0 <= num_tokens <= _ANY_NUMBER):
        raise ValueError(f"it has {num_rows} rows, an entry names others")
    return id, sha256, first_row, rows, num_tokens


class _NothingToWrite(Exception):
    """Ends a shard without a document."""
