"""One run over a corpus, from the scan to the index.

    scan ──► missing shards ──► read · tokenise ahead · encode ──► shards ──► index
                                                          └──► latent cache

Run it again after an interruption: what the shards (or the cache) hold is not encoded again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from utils.compress.latent_cache import DEFAULT_LIMIT_BYTES, LatentCache
from utils.corpus.encode import CorpusJob, Counts, Steps, encode_here
from utils.corpus.index import INDEX_FILE, SKIPPED_FILE, CorpusIndex, new_index
from utils.corpus.shards import CorpusOutput
from utils.corpus.source import Document
from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10


def encode_corpus(
    job: CorpusJob,
    *,
    shard_bytes: int = 1 << 20,
    skip_unreadable: bool = False,
    prune: bool = False,
    engine: Callable[[CorpusJob, Iterable[list[Document]]], Steps] = encode_here,
) -> dict[str, Any]:
    """Scan a corpus, encode what is missing, and write the index.

    Args:
        job: What to encode, and whereto.
        shard_bytes: Text of one shard.
        skip_unreadable: Leave out, and list, what cannot be encoded; without it only a folder's files that are no text.
        prune: Remove shards of which nothing is part of the corpus any more.
        engine: Encodes the documents of shards; `encode_with_ray` is the other one.

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
            index.add_shards(output.shards())
        worked = time.monotonic()
        done: Counts = Counter()
        if todo := index.missing_bytes:  # without anything to do no model is loaded
            done = _encode(engine(job, index.missing_shards(shard_bytes)), todo, to_cache=output is None)
        seconds = time.monotonic() - worked
        summary = {
            "corpus": job.source.place,
            "checkpoint": str(job.files.root),
            "chunk_size": job.files.config.chunk_size,
            "problems": index.num_problems,
            "encoded_documents": done["documents"],
            "encoded_tokens": done["tokens"] - done["cached_tokens"],
            "missing": done["failed"],
            "seconds": round(time.monotonic() - began, 3),
            "tokens_per_second": round(done["tokens"] / seconds, 1) if done["tokens"] else 0.0,
            "corpus_sha256": index.corpus_sha256,
        }
        return summary | (_in_cache(index, job, done) if output is None else _in_shards(index, output, done, prune))


def _scan(index: CorpusIndex, job: CorpusJob, skip_unreadable: bool) -> None:
    with tqdm(unit="B", unit_scale=True, desc="reading the corpus", disable=None) as bar:
        index.scan(bar.update)
    if index.num_problems:
        # A folder of code has pictures, too. They are listed; only what should have been encoded ends the run.
        refused = index.num_duplicates > 0 or (index.num_texts_with_problems > 0 and not skip_unreadable)
        # Shards have a file that lists them all.
        shown = [str(problem) for problem in index.problems(SHOWN_PROBLEMS if refused or job.output else -1)]
        more = [f"… and {index.num_problems - len(shown)} more"] if index.num_problems > len(shown) else []
        message = "\n  ".join([f"{index.num_problems} files or lines cannot be encoded:", *shown, *more])
        if index.num_duplicates:
            raise DatasetError(f"{message}\ngive each line an id of its own, or number the lines with --line-ids")
        if refused:
            raise DatasetError(f"{message}\ncorrect them, leave files out with --exclude, or pass --skip-unreadable")
        logger.warning("%s", message)
    if not index.num_documents:
        raise DatasetError("the corpus is empty: no file or line to encode (hidden files do not count)")


def _encode(steps: Steps, text_bytes: int, to_cache: bool) -> Counts:
    done: Counts = Counter()
    began = time.monotonic()
    with (
        tqdm(total=text_bytes, unit="B", unit_scale=True, desc="encoding", disable=None) as bar,
        contextlib.closing(steps),
    ):
        for counts in steps:
            done.update(counts)
            bar.update(counts["text_bytes"])
            bar.set_postfix_str(f"{done['tokens'] / (time.monotonic() - began):.0f} tokens/s", refresh=False)
            if to_cache and done["latent_bytes"] > DEFAULT_LIMIT_BYTES:
                raise ConfigError(
                    f"the corpus has more latents than the latent cache keeps ({DEFAULT_LIMIT_BYTES >> 30} GiB), its "
                    "first ones would leave again: write shards with --output instead"
                )
    return done


def _in_cache(index: CorpusIndex, job: CorpusJob, done: Counts) -> dict[str, Any]:
    return {
        "cache": str(job.cache_dir),
        "documents": index.num_documents - done["failed"],
        "memory_tokens": done["tokens"],
        "cached_tokens": done["cached_tokens"],
        "num_latents": done["latents"],
    }


def _in_shards(index: CorpusIndex, output: CorpusOutput, done: Counts, prune: bool) -> dict[str, Any]:
    """Write the index, unless there was nothing to do and it says all this already."""
    path = output.root / INDEX_FILE
    if done:
        index.add_shards(output.shards())
    counts = None if done else index.written_counts(path)
    was_complete = counts is not None
    if counts is None:
        skipped = ({"place": problem.place, "reason": problem.reason} for problem in index.problems())
        write_jsonl(output.root / SKIPPED_FILE, skipped)
        counts = index.write(path, int(output.settings["chunk_size"]))
    unused = index.unused_shards()
    for name in unused if prune else ():
        (output.root / name).unlink(missing_ok=True)
    return {
        "output": str(output.root),
        **counts,
        "unused_shards": 0 if prune else len(unused),
        "pruned_shards": len(unused) if prune else 0,
        "was_complete": was_complete,
    }
