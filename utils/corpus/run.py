"""One run over a corpus, from the scan to the index.

    scan ──► missing shards ──► read · tokenise ahead · encode ──► shards ──► index
                                                          └──► latent cache

Interrupted at any moment, the same run goes on: what the shards (or the cache) hold is not encoded again.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Generator
from dataclasses import asdict
from typing import Any, TypeAlias

from tqdm import tqdm

from utils.compress.latent_cache import DEFAULT_LIMIT_BYTES, LatentCache
from utils.corpus.encode import CorpusJob, CorpusWorker, WorkCounts
from utils.corpus.index import INDEX_FILE, SKIPPED_FILE, CorpusIndex, new_index
from utils.corpus.ray import RayWorkers, encode_with_ray
from utils.corpus.shards import CorpusOutput
from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10
Steps: TypeAlias = Generator[WorkCounts, None, None]


def encode_corpus(
    job: CorpusJob,
    *,
    shard_bytes: int = 1 << 20,
    skip_unreadable: bool = False,
    prune: bool = False,
    ray: RayWorkers | None = None,
) -> dict[str, Any]:
    """Scan a corpus, encode what is missing, and write the index.

    Args:
        job: What to encode, and whereto.
        shard_bytes: Text of one shard.
        skip_unreadable: Leave out, and list, what cannot be encoded.
        prune: Remove shards of which nothing is part of the corpus any more.
        ray: Encode with Ray Data; None: in this process.

    Returns:
        The summary, as JSON values; `missing` counts documents that vanished or changed meanwhile.

    Raises:
        DatasetError: The corpus is empty or has unusable documents, or the output cannot be written.
        ConfigError: The output is another run's, or settings cannot be.
        CheckpointError: The checkpoint cannot be used.
    """
    began = time.monotonic()
    output = job.output
    if output is None:
        # A cache that cannot be used is better known before a long scan.
        LatentCache.open(job.cache_dir, strict=True)
    with output.locked() if output else contextlib.nullcontext(), new_index(job.source) as index:
        _scan(index, job, skip_unreadable)
        if output is not None:
            output.begin()
            _add_shards(index, output)
        worked = time.monotonic()
        done = _encode(index, job, shard_bytes, ray)
        seconds = time.monotonic() - worked
        summary = {
            "corpus": job.source.place,
            "checkpoint": str(job.files.root),
            "chunk_size": job.files.config.chunk_size,
            "problems": index.num_problems,
            "encoded_documents": done.documents,
            "encoded_tokens": done.tokens - done.cached_tokens,
            "missing": done.failed,
            "engine": "ray" if ray else "process",
            "seconds": round(time.monotonic() - began, 3),
            "tokens_per_second": round(done.tokens / seconds, 1) if done.tokens else 0.0,
            "corpus_sha256": index.corpus_sha256(),
        }
        return summary | (_in_cache(index, job, done) if output is None else _in_shards(index, output, done, prune))


def _scan(index: CorpusIndex, job: CorpusJob, skip_unreadable: bool) -> None:
    with tqdm(unit="B", unit_scale=True, desc="reading the corpus", disable=None) as bar:
        index.scan(bar.update)
    if index.num_problems:
        refused = index.num_duplicates > 0 or not skip_unreadable
        # Shards have a file that lists them all.
        shown = [str(problem) for problem in index.problems(SHOWN_PROBLEMS if refused or job.output else -1)]
        more = [f"… and {index.num_problems - len(shown)} more"] if index.num_problems > len(shown) else []
        message = "\n  ".join([f"{index.num_problems} documents cannot be encoded:", *shown, *more])
        if index.num_duplicates:
            raise DatasetError(f"{message}\ngive each line an id of its own, or number the lines with --line-ids")
        if refused:
            raise DatasetError(f"{message}\ncorrect them, leave files out with --exclude, or pass --skip-unreadable")
        logger.warning("%s", message)
    if not index.num_documents:
        raise DatasetError("the corpus is empty: no file or line to encode (hidden files do not count)")


def _add_shards(index: CorpusIndex, output: CorpusOutput) -> None:
    for name, records in output.shards():
        index.add_shard(name, records)


def _encode(index: CorpusIndex, job: CorpusJob, shard_bytes: int, ray: RayWorkers | None) -> WorkCounts:
    """Encode what is missing; without anything, no model is loaded."""
    done = WorkCounts()
    if not (text_bytes := index.missing_bytes):
        return done
    with (
        tqdm(total=text_bytes, unit="B", unit_scale=True, desc="encoding", disable=None) as bar,
        # Ray tells on stdout what becomes of its workers; a command's stdout is for its result alone.
        contextlib.redirect_stdout(sys.stderr) if ray else contextlib.nullcontext(),
        contextlib.closing(_work(index, job, shard_bytes, ray)) as steps,
    ):
        began = time.monotonic()
        for counts in steps:
            done += counts
            bar.update(counts.text_bytes)
            bar.set_postfix_str(f"{done.tokens / (time.monotonic() - began):.0f} tokens/s", refresh=False)
            if job.output is None and done.latent_bytes > DEFAULT_LIMIT_BYTES:
                raise ConfigError(
                    f"the corpus has more latents than the latent cache keeps ({DEFAULT_LIMIT_BYTES >> 30} GiB), its "
                    "first ones would leave again: write shards with --output instead"
                )
    return done


def _work(index: CorpusIndex, job: CorpusJob, shard_bytes: int, ray: RayWorkers | None) -> Steps:
    shards = index.missing_shards(shard_bytes)
    return encode_with_ray(job, list(shards), ray) if ray else CorpusWorker(job).encode(shards)


def _in_cache(index: CorpusIndex, job: CorpusJob, done: WorkCounts) -> dict[str, Any]:
    return {
        "cache": str(job.cache_dir),
        "documents": index.num_documents - done.failed,
        "memory_tokens": done.tokens,
        "cached_tokens": done.cached_tokens,
        "num_latents": done.latents,
    }


def _in_shards(index: CorpusIndex, output: CorpusOutput, done: WorkCounts, prune: bool) -> dict[str, Any]:
    """Write the index, unless there was nothing to do and it says all this already."""
    path = output.root / INDEX_FILE
    worked = done != WorkCounts()
    if worked:
        _add_shards(index, output)
    counts = None if worked else index.written_counts(path)
    was_complete = counts is not None
    if counts is None:
        write_jsonl(output.root / SKIPPED_FILE, (asdict(problem) for problem in index.problems()))
        counts = index.write(path, int(output.settings["chunk_size"]))
    unused = index.unused_shards()
    for name in unused if prune else ():
        (output.root / name).unlink(missing_ok=True)
    return {
        "output": str(output.root),
        **asdict(counts),
        "unused_shards": 0 if prune else len(unused),
        "pruned_shards": len(unused) if prune else 0,
        "was_complete": was_complete,
    }
