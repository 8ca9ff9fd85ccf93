"""Documents to latents, in a shard each time or into the latent cache: what one process does, and each Ray worker.

    worker = CorpusWorker(job)
    for counts in worker.encode(index.missing_shards(1 << 20)): …

One thread reads and tokenises ahead, many texts a call, while this one encodes; between them wait at most a few groups.
A group is some neighbouring documents whose windows are packed together: `SpanEncoder` does that, as for prompts.
Groups depend on the shard alone, so that a document's bits do not depend on which process encodes it, or when.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import load_memory_encoder
from utils.checkpoint.settings import EncoderSettings
from utils.compress.latent_cache import LatentCache
from utils.compress.span_encoder import SpanEncoder
from utils.corpus.index import in_groups
from utils.corpus.reading import UnusableTextError
from utils.corpus.shards import CorpusOutput, Shard, new_shard
from utils.corpus.source import Document, Source
from utils.errors import shown_name
from utils.model.prompt import MemorySpan, num_latents

logger = logging.getLogger(__name__)

# A group fills many encoder passes, so that the last, short one costs little and equal lengths find each other.
PASSES_PER_GROUP = 16
# Texts of one call of the tokenizer, which spreads them over its threads.
TOKENIZED_TEXTS = 256
TOKENIZED_BYTES = 1 << 18
GROUPS_AHEAD = 2

# What was done: documents encoded, documents that failed (they vanished or changed since the scan), text_bytes of both,
# encoder tokens, cached_tokens (of these, those whose latents the cache had), latents and latent_bytes.
Counts: TypeAlias = Counter[str]
Steps: TypeAlias = Generator[Counts, None, None]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusJob:
    """What is to be encoded, how, and whereto: all that a worker must know.

    Attributes:
        source: The corpus.
        files: The checkpoint.
        settings: How its encoder runs.
        output: The shards' folder; None: into the latent cache.
        cache_dir: Folder of the latent cache; None with an output.
        threads: CPU threads; None: torch's own choice.
    """

    source: Source
    files: CheckpointFiles
    settings: EncoderSettings
    output: CorpusOutput | None
    cache_dir: Path | None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents of one shard with their token ids; None in place of what cannot be read any more."""

    shard_number: int
    shard_documents: list[Document]
    tokens: list[tuple[Document, list[int] | None]]


class CorpusWorker:
    """Tokenizer and memory encoder of one process."""

    def __init__(self, job: CorpusJob) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
            # The tokenizer's; read when it is first used.
            os.environ["RAYON_NUM_THREADS"] = str(job.threads)
        self._job = job
        memory_encoder = load_memory_encoder(job.files, job.settings)
        cache = LatentCache.open(job.cache_dir, strict=True) if job.output is None else None
        self._tokenizer = memory_encoder.chunker.tokenizer
        self._spans = SpanEncoder(memory_encoder, job.files.fingerprint, cache)
        self._group_tokens = PASSES_PER_GROUP * memory_encoder.chunker.pass_tokens

    def encode(self, shards: Iterable[list[Document]]) -> Steps:
        """Encode shards one after the other.

        Args:
            shards: The documents of each, asked for from another thread as the work needs them.

        Yields:
            What was done since the last time; a shard is on disk once its last group has been followed by another or
            by the end.

        Raises:
            DatasetError: A shard cannot be written.
            ConfigError: The latent cache cannot take the latents.
        """
        with contextlib.closing(ahead(self._groups(shards), GROUPS_AHEAD)) as groups:
            for _, of_shard in itertools.groupby(groups, key=lambda group: group.shard_number):
                first = next(of_shard)
                with self._shard(first.shard_documents) as shard:
                    for group in itertools.chain([first], of_shard):
                        yield self._encode(group, shard)

    def _shard(self, documents: list[Document]) -> contextlib.AbstractContextManager[Shard | None]:
        output = self._job.output
        return contextlib.nullcontext() if output is None else new_shard(output.root, documents, output.about)

    def _encode(self, group: _Group, shard: Shard | None) -> Counts:
        read = [(document, ids) for document, ids in group.tokens if ids is not None]
        encoded = self._spans.encode([self._span(ids) for _, ids in read if ids])
        remaining = iter(encoded)
        for document, ids in read:
            latents_ND = next(remaining)[0] if ids else None
            if shard is not None:
                shard.add(document, latents_ND, len(ids))
        return Counter(
            documents=len(read),
            failed=len(group.tokens) - len(read),
            text_bytes=sum(document.text_bytes for document, _ in group.tokens),
            tokens=sum(len(ids) for _, ids in read),
            cached_tokens=sum(cached for _, cached in encoded),
            latents=sum(len(latents) for latents, _ in encoded),
            latent_bytes=sum(latents.nbytes for latents, _ in encoded),
        )

    def _span(self, ids: list[int]) -> MemorySpan:
        size = self._job.files.config.chunk_size
        return MemorySpan(text="", token_ids=ids, start=0, stop=num_latents(len(ids), size), chunk_size=size)

    def _groups(self, shards: Iterable[list[Document]]) -> Iterator[_Group]:
        for number, documents in enumerate(shards):
            group, size = _Group(number, documents, []), 0
            for document, ids in self._tokens(documents):
                group.tokens.append((document, ids))
                size += len(ids or ())
                if size >= self._group_tokens:
                    yield group
                    group, size = _Group(number, documents, []), 0
            if group.tokens:
                yield group

    def _tokens(self, documents: list[Document]) -> Iterator[tuple[Document, list[int] | None]]:
        """Documents with their token ids; None for those that cannot be read any more."""
        for batch in in_groups(documents, lambda document: document.text_bytes, TOKENIZED_BYTES, TOKENIZED_TEXTS):
            texts: dict[str, str] = {}
            for document in batch:
                try:
                    texts[document.id] = self._job.source.read(document)
                except UnusableTextError as error:
                    logger.warning("%s is left out: %s", shown_name(document.id), error)
            ids = self._tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"] if texts else []
            ids_of = dict(zip(texts, ids, strict=True))
            yield from ((document, ids_of.get(document.id)) for document in batch)


def encode_here(job: CorpusJob, shards: Iterable[list[Document]]) -> Steps:
    """Encode shards in this process; see `CorpusWorker.encode`."""
    yield from CorpusWorker(job).encode(shards)


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Make items in a thread of their own, at most `depth` before they are asked for; close it to end the thread.

    An error among them is raised where the next item is taken.
    """
    end = object()
    with ThreadPoolExecutor(1, "corpus reader") as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(cancel_futures=True)
