"""One run over a corpus, from the scan to the index: what the leading process does, and what the others do.

    scan ──► plan (what is new) ──► parcels ──► workers ──► shards ──► index
                                                       └──► latent cache

Interrupted at any moment, the same run goes on: what the shards (or the cache) hold is not encoded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.locate import find_checkpoint
from utils.compress.latent_cache import DEFAULT_LIMIT_BYTES, LatentCache, default_cache_dir
from utils.compress.latent_files import PLANS_FOLDER
from utils.corpus.crew import Crew, WorkCounts
from utils.corpus.encoder import CorpusJob, CorpusWorker
from utils.corpus.output import PLAN_FILE, SKIPPED_FILE, CorpusCounts, CorpusOutput
from utils.corpus.plan import CorpusPlan
from utils.corpus.source import FolderSource, JsonlSource
from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl
from utils.locks import sole_writer

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 10
_PLAN_PREFIX = "run-"
POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRun:
    """What is wanted.

    Attributes:
        source: The corpus.
        checkpoint: Folder or hub id; None for the embedded default.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        output: Folder of the shards; None: into the latent cache.
        cache_dir: Folder of the latent cache where there is no `output`.
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        dtype: The encoder's dtype, "auto" as stored.
        attn_implementation: See `load_memory_encoder`.
        batch_tokens: Tokens of one encoder pass; None: by device.
        compiled: See `CodeChunker`.
        shard_bytes: Text of one shard.
        skip_unreadable: Leave out, and list, what cannot be encoded.
        prune: Remove shards of which nothing is part of the corpus any more.
        engine: "processes" or "ray".
        threads: CPU threads of a process; None: its share.
        workers: Ray actors; None: by device.
        ray_address: A running cluster; None: one of its own.
    """

    source: FolderSource | JsonlSource
    checkpoint: str | None = None
    chunk_size: int | None = None
    output: str | None = None
    cache_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_tokens: int | None = None
    compiled: bool = False
    shard_bytes: int = 1 << 20
    skip_unreadable: bool = False
    prune: bool = False
    engine: str = "processes"
    threads: int | None = None
    workers: int | None = None
    ray_address: str | None = None


def follow(run: CorpusRun, crew: Crew) -> None:
    """Work as one of the processes that do not lead."""
    crew.set_threads(run.threads)
    job = CorpusJob(**json.loads(crew.receive()))
    if job.num_parcels:
        _work(job, run, crew, lambda _: None)


def lead(run: CorpusRun, crew: Crew) -> dict[str, Any]:
    """Scan, plan, work, and write the index.

    Returns:
        The summary, as JSON values; `missing` counts documents that vanished or changed meanwhile.

    Raises:
        DatasetError: The corpus is empty or has unusable documents, or the output cannot be written.
        ConfigError: The output is another run's, or settings cannot be.
        CheckpointError: The checkpoint cannot be used.
    """
    if run.engine == "ray" and crew.size > 1:
        raise ConfigError("--engine ray starts its own workers: run it without a launcher")
    crew.set_threads(run.threads)
    began = time.monotonic()
    files = find_checkpoint(run.checkpoint, run.chunk_size)
    settings = {
        # Not which files are taken: more or fewer of them are the same corpus, grown or shrunk.
        "corpus": run.source.place,
        "fields": [getattr(run.source, name, None) for name in ("text_field", "id_field")],
        "fingerprint": files.fingerprint,
        "chunk_size": files.config.chunk_size,
        "dtype": run.dtype,
    }
    with _output(run, settings) as output, _plan(run, output) as plan:
        _scan(run, plan)
        if output is not None:
            output.begin()
            plan.add_finished(output.finished())
        num_parcels, text_bytes = plan.cut(run.shard_bytes)
        job = _job(run, files, plan, num_parcels, output)
        crew.publish(json.dumps(dataclasses.asdict(job)))
        worked = time.monotonic()
        with tqdm(total=text_bytes, unit="B", unit_scale=True, desc="encoding", disable=None) as bar:
            done = _work(job, run, crew, _shower(bar, run)) if num_parcels else WorkCounts()
        seconds = time.monotonic() - worked
        summary = {
            "corpus": run.source.place,
            "checkpoint": str(files.root),
            "chunk_size": files.config.chunk_size,
            "problems": plan.num_problems,
            "encoded_documents": done.documents,
            "encoded_tokens": done.tokens - done.cached_tokens,
            "missing": done.failed,
            "engine": run.engine,
            "processes": crew.size,
            "seconds": round(time.monotonic() - began, 3),
            "tokens_per_second": round(done.tokens / seconds, 1) if done.tokens else 0.0,
        }
        return summary | (_into_cache(run, plan, done) if output is None else _finish(run, output, plan, num_parcels))


def _work(job: CorpusJob, run: CorpusRun, crew: Crew, show: Callable[[WorkCounts], None]) -> WorkCounts:
    """Encode until no parcel is left; the leader then waits for the others."""
    if run.engine == "ray":
        from utils.corpus.ray import encode_with_ray

        done = WorkCounts()
        # Ray tells on stdout what becomes of its actors; a command's stdout is for its result alone.
        with contextlib.redirect_stdout(sys.stderr):
            for counts in encode_with_ray(job, workers=run.workers, threads=run.threads, address=run.ray_address):
                done += counts
                show(done)
        return done
    worker = CorpusWorker(dataclasses.replace(job, device=crew.own_device(job.device)))
    with contextlib.closing(worker.encode(crew.claims(job.num_parcels))) as steps:
        for counts in steps:
            crew.add(counts)
            show(crew.totals())
    crew.leave()
    while crew.rank == 0 and crew.is_working:
        time.sleep(POLL_S)
        show(crew.totals())
    return crew.totals()


@contextlib.contextmanager
def _output(run: CorpusRun, settings: dict[str, Any]) -> Iterator[CorpusOutput | None]:
    if run.output is None:
        yield None
        return
    with CorpusOutput.opened(run.output, settings) as output:
        yield output


@contextlib.contextmanager
def _plan(run: CorpusRun, output: CorpusOutput | None) -> Iterator[CorpusPlan]:
    with contextlib.ExitStack() as stack:
        folder = output.root if output is not None else stack.enter_context(_folder_in_cache(run))
        yield stack.enter_context(CorpusPlan.create(folder / PLAN_FILE))


@contextlib.contextmanager
def _folder_in_cache(run: CorpusRun) -> Iterator[Path]:
    """A folder of this run alone, as private as the latents beside it: a plan has the ids and hashes of texts."""
    cache = _cache_dir(run)
    # One that cannot be used is better known before a long scan.
    LatentCache.open(cache, strict=True).close()
    plans = cache / PLANS_FOLDER
    plans.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with sole_writer(plans, wait=True) as held:
            if held:
                _remove_dead_plans(plans)
            folder = Path(tempfile.mkdtemp(prefix=_PLAN_PREFIX, dir=plans))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(sole_writer(folder))
        yield folder


def _remove_dead_plans(plans: Path) -> None:
    for folder in plans.glob(f"{_PLAN_PREFIX}*"):
        with contextlib.suppress(ConfigError, OSError), sole_writer(folder) as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)


def _cache_dir(run: CorpusRun) -> Path:
    return Path(run.cache_dir or default_cache_dir()).expanduser().absolute()


def _scan(run: CorpusRun, plan: CorpusPlan) -> None:
    with tqdm(unit="B", unit_scale=True, desc="reading the corpus", disable=None) as bar:
        plan.scan(run.source, bar.update)
    if plan.num_problems:
        refused = plan.num_duplicates > 0 or not run.skip_unreadable
        # Shards have a file that lists them all.
        shown = [str(problem) for problem in plan.problems(SHOWN_PROBLEMS if refused or run.output else -1)]
        more = [f"… and {plan.num_problems - len(shown)} more"] if plan.num_problems > len(shown) else []
        message = "\n  ".join([f"{plan.num_problems} documents cannot be encoded:", *shown, *more])
        if plan.num_duplicates:
            raise DatasetError(f"{message}\ngive each line an id of its own, or number the lines with --line-ids")
        if refused:
            raise DatasetError(f"{message}\ncorrect them, leave files out with --exclude, or pass --skip-unreadable")
        logger.warning("%s", message)
    if not plan.num_documents:
        raise DatasetError("the corpus is empty: no file or line to encode (hidden files do not count)")


def _job(
    run: CorpusRun, files: CheckpointFiles, plan: CorpusPlan, num_parcels: int, output: CorpusOutput | None
) -> CorpusJob:
    return CorpusJob(
        checkpoint=str(files.root.resolve()),
        fingerprint=files.fingerprint,
        chunk_size=files.config.chunk_size,
        device=run.device,
        dtype=run.dtype,
        attn_implementation=run.attn_implementation,
        batch_tokens=run.batch_tokens,
        compiled=run.compiled,
        source=run.source.to_json(),
        plan=str(plan.path.resolve()),
        num_parcels=num_parcels,
        output=str(output.root.resolve()) if output is not None else None,
        about=output.about if output is not None else {},
        cache_dir=str(_cache_dir(run).resolve()) if output is None else None,
    )


def _shower(bar: Any, run: CorpusRun) -> Callable[[WorkCounts], None]:
    began = time.monotonic()

    def show(done: WorkCounts) -> None:
        bar.update(done.text_bytes - bar.n)
        bar.set_postfix_str(f"{done.tokens / (time.monotonic() - began):.0f} tokens/s", refresh=False)
        if run.output is None and done.latent_bytes > DEFAULT_LIMIT_BYTES:
            raise ConfigError(
                f"the corpus has more latents than the latent cache keeps ({DEFAULT_LIMIT_BYTES >> 30} GiB), its first "
                "ones would leave again: write shards with --output instead"
            )

    return show


def _into_cache(run: CorpusRun, plan: CorpusPlan, done: WorkCounts) -> dict[str, Any]:
    return {
        "cache": str(_cache_dir(run)),
        "documents": plan.num_documents - done.failed,
        "memory_tokens": done.tokens,
        "cached_tokens": done.cached_tokens,
        "num_latents": done.latents,
        "corpus_sha256": plan.corpus_sha256(),
    }


def _finish(run: CorpusRun, output: CorpusOutput, plan: CorpusPlan, num_parcels: int) -> dict[str, Any]:
    """Write the index, unless it says all this already."""
    plan.add_finished(output.finished())
    if was_complete := not num_parcels and output.is_complete(plan):
        counts: CorpusCounts = output.read_counts()
    else:
        write_jsonl(output.root / SKIPPED_FILE, (dataclasses.asdict(problem) for problem in plan.problems()))
        counts = output.write_index(plan)
    removed = output.prune(plan) if run.prune else []
    return {
        "output": str(output.root),
        **dataclasses.asdict(counts),
        "unused_shards": len(plan.unused_shards()) - len(removed),
        "pruned_shards": len(removed),
        "corpus_sha256": plan.corpus_sha256(),
        "was_complete": was_complete,
    }
