"""Parcels of documents to latents, in a shard each or into the latent cache: what every engine's workers run.

    worker = CorpusWorker(job)
    for counts in worker.encode(parcel_numbers): …

One thread reads and tokenises ahead, many texts a call, while this one encodes; between them wait at most a few groups.
A group is some neighbouring documents whose windows are packed together: `SpanEncoder` does that, as for prompts.
Groups depend on the parcel alone, so that a document's bits do not hang on which process encodes it, or when.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from utils.checkpoint.load import load_memory_encoder
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import EncoderSettings
from utils.compress.latent_cache import LatentCache
from utils.compress.span_encoder import SpanEncoder
from utils.corpus.crew import WorkCounts
from utils.corpus.plan import parcel_documents
from utils.corpus.reading import UnusableTextError
from utils.corpus.shards import Shard, new_shard
from utils.corpus.source import Document, source_from_json
from utils.errors import shown_name
from utils.model.prompt import MemorySpan, num_latents

logger = logging.getLogger(__name__)

# A group fills many encoder passes, so that the last, short one costs little and equal lengths find each other.
PASSES_PER_GROUP = 16
# Texts of one call of the tokenizer, which spreads them over its threads.
TOKENIZED_TEXTS = 256
TOKENIZED_BYTES = 1 << 18
GROUPS_AHEAD = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusJob:
    """What a worker must know, as values that travel between processes.

    Attributes:
        checkpoint: The checkpoint's folder.
        fingerprint: Its fingerprint, computed once.
        chunk_size: Encoder tokens per latent.
        device: Where to encode.
        dtype: The encoder's dtype, "auto" as stored.
        attn_implementation: See `load_memory_encoder`.
        batch_tokens: Tokens of one encoder pass; None: by device.
        compiled: See `CodeChunker`.
        source: `to_json` of the source.
        plan: File of the plan.
        num_parcels: Parcels in it.
        output: Folder of the shards; None: the latent cache only.
        about: Metadata of every shard.
        cache_dir: Folder of the latent cache; None: none is used.
    """

    checkpoint: str
    fingerprint: str
    chunk_size: int
    device: str
    dtype: str
    attn_implementation: str | None
    batch_tokens: int | None
    compiled: bool
    source: Mapping[str, Any]
    plan: str
    num_parcels: int
    output: str | None
    about: Mapping[str, str]
    cache_dir: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    parcel: int
    planned: list[Document]
    tokens: list[tuple[Document, list[int]]] = field(default_factory=list)
    failed: list[Document] = field(default_factory=list)


class CorpusWorker:
    """Tokenizer and memory encoder of one process."""

    def __init__(self, job: CorpusJob) -> None:
        self._job = job
        self._source = source_from_json(dict(job.source))
        files = find_checkpoint(job.checkpoint, job.chunk_size)
        settings = EncoderSettings(
            device=job.device,
            dtype=job.dtype,
            attn_implementation=job.attn_implementation,
            batch_tokens=job.batch_tokens,
            compiled=job.compiled,
        )
        memory_encoder = load_memory_encoder(files, settings)
        cache = LatentCache.open(job.cache_dir, strict=True) if job.cache_dir is not None else None
        self._tokenizer = memory_encoder.chunker.tokenizer
        self._spans = SpanEncoder(memory_encoder, job.fingerprint, cache)
        self._group_tokens = PASSES_PER_GROUP * memory_encoder.chunker.pass_tokens

    def encode(self, parcels: Iterable[int]) -> Generator[WorkCounts, None, None]:
        """Encode parcels one after the other.

        Args:
            parcels: Their numbers, asked for one by one from another thread as the work needs them.

        Yields:
            What was done since the last time; a parcel's documents are safe once its last group has been followed by
            another or by the end.

        Raises:
            DatasetError: A shard cannot be written.
            ConfigError: The latent cache cannot take the latents.
        """
        with in_background(self._groups(parcels), GROUPS_AHEAD) as groups:
            for _, of_parcel in itertools.groupby(groups, key=lambda group: group.parcel):
                first = next(of_parcel)
                with self._shard(first.planned) as shard:
                    for group in itertools.chain([first], of_parcel):
                        yield self._encode(group, shard)

    @contextlib.contextmanager
    def _shard(self, documents: list[Document]) -> Iterator[Shard | None]:
        if self._job.output is None:
            yield None
            return
        with new_shard(Path(self._job.output), documents, self._job.about) as shard:
            yield shard

    def _encode(self, group: _Group, shard: Shard | None) -> WorkCounts:
        spans = [self._span(ids) for _, ids in group.tokens if ids]
        encoded = self._spans.encode(spans)
        remaining = iter(encoded)
        for document, ids in group.tokens:
            latents_ND = next(remaining)[0] if ids else None
            if shard is not None:
                shard.add(document, latents_ND, len(ids))
        return WorkCounts(
            documents=len(group.tokens),
            failed=len(group.failed),
            text_bytes=sum(x.text_bytes for x, _ in group.tokens) + sum(x.text_bytes for x in group.failed),
            tokens=sum(len(ids) for _, ids in group.tokens),
            cached_tokens=sum(cached for _, cached in encoded),
            latents=sum(len(latents) for latents, _ in encoded),
            latent_bytes=sum(latents.nbytes for latents, _ in encoded),
        )

    def _span(self, ids: list[int]) -> MemorySpan:
        size = self._job.chunk_size
        return MemorySpan(text="", token_ids=ids, start=0, stop=num_latents(len(ids), size), chunk_size=size)

    def _groups(self, parcels: Iterable[int]) -> Iterator[_Group]:
        for number in parcels:
            planned = parcel_documents(Path(self._job.plan), number)
            group, size = _Group(parcel=number, planned=planned), 0
            for documents, texts, failed in self._texts(planned):
                group.failed.extend(failed)
                for document, ids in zip(documents, self._token_ids(texts), strict=True):
                    group.tokens.append((document, ids))
                    size += len(ids)
                    if size >= self._group_tokens:
                        yield group
                        group, size = _Group(parcel=number, planned=planned), 0
            if group.tokens or group.failed:
                yield group

    def _texts(self, documents: list[Document]) -> Iterator[tuple[list[Document], list[str], list[Document]]]:
        """Documents with their texts, some at a time, and those that cannot be read any more."""
        good: list[Document] = []
        texts: list[str] = []
        failed: list[Document] = []
        size = 0
        for document in documents:
            try:
                texts.append(self._source.read(document))
                good.append(document)
                size += document.text_bytes
            except UnusableTextError as error:
                logger.warning("%s is left out: %s", shown_name(document.id), error)
                failed.append(document)
            if size >= TOKENIZED_BYTES or len(good) >= TOKENIZED_TEXTS:
                yield good, texts, failed
                good, texts, failed, size = [], [], [], 0
        yield good, texts, failed

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


@contextlib.contextmanager
def in_background(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Make items in a thread of their own, at most `depth` ahead of who takes them.

    An error among them is raised where the next item is taken. When the block ends, the thread does, too.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where items are taken
            put(None, error)

    def take() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    thread = threading.Thread(target=produce, name="corpus reader", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        thread.join()
