"""Encode a corpus with Ray Data: workers on one machine or a cluster, shards streamed to whoever is free.

Ray is an optional extra (`uv sync --extra ray`). The documents of a shard are a row; a worker writes the shard and
answers with counts. A worker that dies is replaced and its shard made again, under the same name. On a cluster every
machine needs this project, the corpus, the checkpoint and the output folder under the same paths.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from utils.corpus.encode import CorpusJob, CorpusWorker, Counts, Steps
from utils.corpus.source import Document
from utils.errors import CodeLlavaError, ConfigError, first_line


class _Encoder:
    """One Ray worker."""

    def __init__(self, job: CorpusJob) -> None:
        self._job = job
        self._worker: CorpusWorker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        done: Counts = Counter()
        problem = ""
        try:
            self._worker = self._worker or CorpusWorker(self._job)
            documents = [Document(**values) for values in json.loads(row["documents"])]
            for counts in self._worker.encode([documents]):
                done.update(counts)
        except CodeLlavaError as error:
            # As a value: Ray would wrap it, try again, and print its traceback.
            problem = str(error)
        return {"done": json.dumps(done), "problem": problem}


def encode_with_ray(
    job: CorpusJob, shards: Iterable[list[Document]], *, workers: int | None = None, address: str | None = None
) -> Steps:
    """Encode shards with Ray workers.

    Args:
        job: What to encode; its device "auto" and "cuda" give each worker a GPU where the cluster has some, and
            without `threads` each has an even share of the cores.
        shards: The documents of each shard.
        workers: How many; None: one a GPU, one in all without GPUs.
        address: A running cluster; None: one on this machine, for this call.

    Yields:
        What was done, shard by shard.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached, or has fewer devices than workers.
        CodeLlavaError: What a worker raised.
    """
    ray = _import_ray()
    # Ray reports on stdout what becomes of its workers; a command's stdout is for its result alone.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            # One core more than workers: Ray warns of a cluster without room for anything else.
            num_cpus = workers + 1 if workers and address is None else None
            ray.init(address=address, num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
        except Exception as error:
            # Ray raises the bare class when a busy machine does not let its processes start in time.
            where = f"--ray-address {address} cannot be used" if address else "Ray cannot start on this machine"
            raise ConfigError(f"{where}: {first_line(error)}") from None
        try:
            yield from _encode(ray, job, shards, workers, on_cluster=address is not None)
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise CodeLlavaError(f"Ray ended the work: {last}; run the same command again") from error
        finally:
            ray.shutdown()


def _encode(ray: Any, job: CorpusJob, shards: Iterable[list[Document]], workers: int | None, on_cluster: bool) -> Steps:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if job.settings.device in ("auto", "cuda") else 0
    count = workers or gpus or 1
    if gpus and count > gpus:
        raise ConfigError(f"--workers {count}: the cluster has {gpus} GPUs, one a worker")
    cores = int(resources.get("CPU", 1)) if on_cluster else os.cpu_count() or 1
    threads = job.threads or max(1, cores // count)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # The largest first: none begins when all others are done.
    ordered = sorted(shards, key=lambda shard: -sum(document.text_bytes for document in shard))
    rows = [{"documents": json.dumps([asdict(document) for document in shard])} for shard in ordered]
    counted = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Encoder,
        fn_constructor_kwargs={"job": replace(job, threads=threads)},
        compute=ray.data.ActorPoolStrategy(size=min(count, len(rows))),
        num_cpus=threads if on_cluster else None,
        num_gpus=1 if gpus else None,
    )
    for row in counted.iter_rows():
        if row["problem"]:
            raise CodeLlavaError(row["problem"])
        yield Counter(json.loads(row["done"]))


def _import_ray() -> Any:
    # Ray would upload the working folder for a driver that `uv run` started, and report its use to its makers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--workers needs Ray, which is not installed: run `uv sync --extra ray`") from None
    # Its execution plan and its progress are not what this command is asked for.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray
