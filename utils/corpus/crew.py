"""The processes that encode one corpus together: who they are, who does which parcel, how far all are.

    crew = Crew.joined()                        # alone, or one of those that a launcher started
    for parcel in crew.claims(num_parcels): …   # each parcel goes to the process that asks first
    crew.add(counts)                            # the sum is everybody's: crew.totals()

Any launcher that sets torch's variables (RANK, WORLD_SIZE, MASTER_ADDR, …) will do: `accelerate launch --multi-gpu`,
which also starts processes on a machine without GPUs, or `torchrun`. The processes share a key-value store and nothing
else: no collective, so that none waits for the slowest before the very end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils.errors import CodeLlavaError

logger = logging.getLogger(__name__)

# Scanning a large corpus takes as long as it takes; a dead launcher is noticed at once.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkCounts:
    """What was done.

    Attributes:
        documents: Documents encoded.
        failed: Documents that vanished or changed since the scan.
        text_bytes: Text of both, UTF-8.
        tokens: Encoder tokens.
        cached_tokens: Of these, the tokens whose latents the latent cache had.
        latents: Latents.
        latent_bytes: Their bytes.
    """

    documents: int = 0
    failed: int = 0
    text_bytes: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    latents: int = 0
    latent_bytes: int = 0

    def __add__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(**{x.name: getattr(self, x.name) + getattr(other, x.name) for x in fields(self)})


class Store(Protocol):
    """What the processes share, as torch's stores have it."""

    def add(self, key: str, value: int, /) -> int:
        """Add to a number, which begins at 0; returns the sum."""

    def get(self, key: str, /) -> bytes:
        """A value."""

    def set(self, key: str, value: str, /) -> None:
        """Set a value."""

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Wait for keys."""


class Crew:
    """This process's place among the processes of a run.

    Args:
        store: What they share.
        rank: Number of this process; 0 leads.
        size: Number of processes.
        local_rank: Number of this process on its machine.
        local_size: Processes on this machine.
    """

    def __init__(self, store: Store, rank: int = 0, size: int = 1, *, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self._store = store

    @classmethod
    def joined(cls) -> Crew:
        """The crew that a launcher started; a crew of one without a launcher."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            if "ACCELERATE_USE_CPU" in os.environ:
                logger.warning(
                    "accelerate started one process: for several on a machine without GPUs pass it --multi-gpu, too"
                )
            return cls(dist.HashStore())  # type: ignore[attr-defined]
        with _explained():
            store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return cls(store, rank, size, local_rank=int(os.environ.get("LOCAL_RANK", rank)), local_size=local_size)

    def publish(self, message: str) -> None:
        """Tell all others something, once."""
        with _explained():
            self._store.set("message", message)

    def receive(self) -> str:
        """What the leader published; waits for it."""
        with _explained():
            self._store.wait(["message"], PATIENCE)
            return self._store.get("message").decode()

    def claims(self, num_parcels: int) -> Iterator[int]:
        """Numbers below `num_parcels` that no other process gets."""
        while (number := self._add("claimed", 1) - 1) < num_parcels:
            yield number

    def add(self, counts: WorkCounts) -> None:
        """Add to the sums of all processes."""
        for field in fields(counts):
            if value := getattr(counts, field.name):
                self._add(field.name, value)

    def totals(self) -> WorkCounts:
        """The sums of all processes."""
        return WorkCounts(**{field.name: self._add(field.name, 0) for field in fields(WorkCounts)})

    def leave(self) -> None:
        """Say that this process is done."""
        self._add("left", 1)

    @property
    def is_working(self) -> bool:
        """Whether any process is not done."""
        return self._add("left", 0) < self.size

    def own_device(self, device: str) -> str:
        """The device of this process: with several, each takes a GPU of its own where `device` names none."""
        if self.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return device

    def set_threads(self, threads: int | None) -> None:
        """Give this process its CPU threads.

        Args:
            threads: How many; None: its share of the cores where there are several processes, else torch's own.
        """
        if threads is None and self.size > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = max(1, cores // self.local_size)
        if threads is not None:
            torch.set_num_threads(threads)
            # The tokenizer's; read when it is first used.
            os.environ["RAYON_NUM_THREADS"] = str(threads)

    def _add(self, name: str, value: int) -> int:
        with _explained():
            return int(self._store.add(name, value))


class _explained:
    """Turn a lost connection into our error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, dist.DistError):
            raise CodeLlavaError(
                "the other processes of this run are gone: what is encoded is kept, run the same command again"
            ) from error
