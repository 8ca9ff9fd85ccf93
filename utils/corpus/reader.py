"""Read an encoded corpus: the latents of one document, or of a prompt's span that is one.

    corpus = EncodedCorpus.open("out")
    corpus.latents("src/main.py")                        # [n, D], read from its shard alone
    corpus.check(compressor.files)                       # the same checkpoint?
    prompt = compressor.parse_raw(f"Explain <|memory_start|>{text}<|memory_end|>")
    embeds = compressor.embed(prompt, [corpus.encoded(span) for span in prompt.spans])   # nothing is encoded

Shape legend: n latents of a document, D decoder width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from utils.checkpoint.layout import CheckpointFiles
from utils.corpus.index import INDEX_FILE, explain_database, open_read_only
from utils.corpus.shards import ABOUT_FILE, TENSOR_NAME, VERSION, checksum
from utils.errors import ConfigError, DatasetError, shown_name
from utils.files import read_json, sha256_bytes
from utils.model.prompt import MemorySpan

_COLUMNS = ("id", "num_tokens", "num_latents", "shard", "first_row", "stop_row", "chunk_size", "sha256", "checksum")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDocument:
    """One row of the index.

    Attributes:
        id: Path in the corpus's folder, or the id of its line.
        num_tokens: Encoder tokens.
        num_latents: Its latents; 0 for an empty text.
        shard: File that holds them; "" for an empty text.
        first_row: Its first row in the shard.
        stop_row: One past its last row.
        chunk_size: Encoder tokens per latent.
        sha256: Hex sha256 of its text as UTF-8.
        checksum: CRC-32 of its rows and counts; 0 for an empty text.
    """

    id: str
    num_tokens: int
    num_latents: int
    shard: str
    first_row: int
    stop_row: int
    chunk_size: int
    sha256: str
    checksum: int


class EncodedCorpus:
    """An output folder of `python -m utils.corpus`; looks documents up on disk, for one thread."""

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.root = root
        self.settings = settings
        self._db = open_read_only(root / INDEX_FILE)
        # The shard of the last document stays open: neighbours in the corpus share it.
        self._shard: tuple[str, Any] = ("", None)

    @classmethod
    def open(cls, path: str | Path) -> EncodedCorpus:
        """Open an output folder.

        Raises:
            DatasetError: It is not one, or its run is not finished.
        """
        root = Path(path)
        if not (root / ABOUT_FILE).is_file():
            raise DatasetError(f"{root} is no encoded corpus: it has no {ABOUT_FILE}")
        if not (root / INDEX_FILE).is_file():
            raise DatasetError(f"{root} has no {INDEX_FILE} yet: run its command again to finish it")
        about = read_json(root / ABOUT_FILE)
        if isinstance(about, dict) and about.get("version") == 1:
            raise DatasetError(f"{root / ABOUT_FILE} is an older version's, without checksums: encode the corpus again")
        settings = about.get("settings") if isinstance(about, dict) and about.get("version") == VERSION else None
        if not isinstance(settings, dict) or not isinstance(settings.get("fingerprint"), str):
            raise DatasetError(f"{root / ABOUT_FILE} is damaged: encode the corpus again, into another folder")
        return cls(root, settings)

    def __len__(self) -> int:
        return int(self._one("SELECT COUNT(*) FROM documents")[0])

    def __iter__(self) -> Iterator[EncodedDocument]:
        """All documents in the corpus's order."""
        return self._documents("ORDER BY position")

    def __contains__(self, id: object) -> bool:
        return self._one("SELECT 1 FROM documents WHERE id = ?", id) is not None

    def document(self, id: str) -> EncodedDocument:
        """The index's row of a document.

        Raises:
            DatasetError: There is none with this id.
        """
        document = next(self._documents("WHERE id = ?", id), None)
        if document is None:
            raise DatasetError(f"{self.root} has no document {id!r}: iterate over it for its ids")
        return document

    def latents(self, id: str) -> torch.Tensor:
        """Latents [n, D] of a document, on the CPU in the dtype they were encoded in; [0, 0] for an empty text.

        Raises:
            DatasetError: There is no such document, or its shard is missing or damaged.
        """
        return self._rows(self.document(id))

    def encoded(self, span: MemorySpan) -> tuple[torch.Tensor, int]:
        """The latents [n, D] of a span whose text is a document's, and its tokens: what `Compressor.embed` takes.

        Raises:
            DatasetError: No document has this text, or it was encoded at another chunk size.
        """
        document = next(self._documents("WHERE sha256 = ? LIMIT 1", sha256_bytes(span.text.encode())), None)
        if document is None:
            raise DatasetError(f"{self.root} has no document with this span's text ({span.text[:40]!r}…): encode it")
        if document.chunk_size != span.chunk_size or document.num_tokens != len(span.token_ids):
            raise DatasetError(
                f"{shown_name(document.id)} was encoded as {document.num_tokens} tokens at chunk size "
                f"{document.chunk_size}, the span has {len(span.token_ids)} at {span.chunk_size}: parse the whole text "
                f"with chunk_size={document.chunk_size}"
            )
        return self._rows(document), document.num_tokens

    def check(self, files: CheckpointFiles) -> None:
        """Refuse a checkpoint whose latents are others than these.

        Raises:
            ConfigError: It is another one.
        """
        if files.fingerprint != self.settings["fingerprint"]:
            raise ConfigError(
                f"{self.root} was encoded with another checkpoint than {files.root}: encode it again, or load that one"
            )

    def _rows(self, document: EncodedDocument) -> torch.Tensor:
        if not document.shard:
            return torch.empty(0, 0)
        # A folder from elsewhere must not name files outside of it.
        path = self.root / Path(document.shard).name
        try:
            if self._shard[0] != document.shard:
                self._shard = (document.shard, safe_open(path, framework="pt"))
            rows_ND = None
            if document.num_latents:
                rows_ND = self._shard[1].get_slice(TENSOR_NAME)[document.first_row : document.stop_row]
        except (OSError, SafetensorError, TypeError, IndexError) as error:
            raise DatasetError(
                f"{path} cannot be read ({error}): run the corpus's command again, it makes missing shards anew"
            ) from None
        if checksum(document.id, document.sha256, document.num_tokens, rows_ND) != document.checksum:
            raise DatasetError(
                f"the latents of {shown_name(document.id)} in {path} are damaged: remove that file and run the "
                "corpus's command again"
            )
        return torch.empty(0, 0) if rows_ND is None else rows_ND

    def close(self) -> None:
        """Close index and shard."""
        self._db.close()
        self._shard = ("", None)

    def __enter__(self) -> EncodedCorpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _documents(self, which: str, *values: Any) -> Iterator[EncodedDocument]:
        with explain_database(self.root / INDEX_FILE):
            for row in self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM documents {which}", values):
                yield EncodedDocument(**dict(zip(_COLUMNS, row, strict=True)))

    def _one(self, query: str, *values: Any) -> Any:
        with explain_database(self.root / INDEX_FILE):
            return self._db.execute(query, values).fetchone()
