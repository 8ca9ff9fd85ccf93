"""Encode a corpus's parcels with Ray Data: actors on one machine or a cluster, parcels streamed to whoever is free.

Ray is an optional extra (`uv sync --extra ray`). A parcel is a row; an actor writes its shard and answers with counts.
An actor that dies is replaced and its parcel done again, under the same name. On a cluster every machine needs this
project, the corpus, the checkpoint and the output folder under the same paths.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from utils.corpus.crew import WorkCounts
from utils.corpus.encoder import CorpusJob, CorpusWorker
from utils.errors import CodeLlavaError, ConfigError, first_line


class _Encoder:
    """One actor."""

    def __init__(self, job: CorpusJob, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._job = job
        self._worker: CorpusWorker | None = None

    def __call__(self, parcels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts, problem = WorkCounts(), ""
        try:
            self._worker = self._worker or CorpusWorker(self._job)
            counts = sum(self._worker.encode(parcels["parcel"].tolist()), counts)
        except CodeLlavaError as error:
            # As a value: Ray would wrap it, try again, and print its traceback.
            problem = str(error)
        return {name: np.array([value]) for name, value in dataclasses.asdict(counts).items()} | {
            "problem": np.array([problem])
        }


def encode_with_ray(
    job: CorpusJob, *, workers: int | None = None, threads: int | None = None, address: str | None = None
) -> Iterator[WorkCounts]:
    """Encode all parcels of a job.

    Args:
        job: What to encode; its device "auto" and "cuda" give each worker a GPU where the cluster has some.
        workers: Actors; None: one a GPU, one in all without GPUs.
        threads: CPU threads of each; None: an even share of the cores.
        address: A running cluster; None: one on this machine, for this call.

    Yields:
        What was done, parcel by parcel.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached, or has fewer devices than workers.
        CodeLlavaError: What a worker raised.
    """
    ray = _import_ray()
    try:
        # One core more than actors: Ray warns of a cluster without room for anything else.
        ray.init(address=address, num_cpus=workers + 1 if workers and address is None else None, **_quiet())
    except Exception as error:
        # Ray raises the bare class when a busy machine does not let its processes start in time.
        where = f"--ray-address {address} cannot be used" if address else "Ray cannot start on this machine"
        raise ConfigError(f"{where}: {first_line(error)}") from None
    try:
        yield from _encode(ray, job, workers, threads, on_cluster=address is not None)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise CodeLlavaError(f"Ray ended the work: {last}; run the same command again") from error
    finally:
        ray.shutdown()


def _encode(
    ray: Any, job: CorpusJob, workers: int | None, threads: int | None, on_cluster: bool
) -> Iterator[WorkCounts]:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if job.device in ("auto", "cuda") else 0
    workers = workers or gpus or 1
    if gpus and workers > gpus:
        raise ConfigError(f"--workers {workers}: the cluster has {gpus} GPUs, one a worker")
    cores = int(resources.get("CPU", 1)) if on_cluster else os.cpu_count() or 1
    threads = threads or max(1, cores // workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"parcel": number} for number in range(job.num_parcels)]
    counted = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Encoder,
        fn_constructor_kwargs={"job": job, "threads": threads},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
        num_cpus=threads if on_cluster else None,
        num_gpus=1 if gpus else None,
    )
    for row in counted.iter_rows():
        if problem := row.pop("problem"):
            raise CodeLlavaError(problem)
        yield WorkCounts(**{name: int(value) for name, value in row.items()})


def _import_ray() -> Any:
    # Ray would upload the working folder for a driver that `uv run` started, and report its use to its makers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--engine ray needs Ray, which is not installed: run `uv sync --extra ray`") from None
    # Its plan and its way of showing progress are not what this command is asked for.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def _quiet() -> dict[str, Any]:
    return {"include_dashboard": False, "configure_logging": True, "logging_level": logging.WARNING}
