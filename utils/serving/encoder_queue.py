"""Encodes the memory spans of concurrent requests together, in one thread beside the event loop.

    queue = EncoderQueue(compressor, max_waiting=256, max_batch_tokens=32768)
    encoded = await queue.encode(spans)           # latents, cached tokens and milliseconds of each span

While one batch is encoded, requests gather for the next: batching costs an idle gateway no waiting time. A request
longer than a batch is encoded alone, and lets shorter ones pass between its micro-batches. Work that no one waits for
any more is not begun, and ends at its next micro-batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils.compress.span_encoder import EncodingStopped
from utils.serving.api_error import ApiError

if TYPE_CHECKING:
    import torch

    from utils.compress.compressor import Compressor
    from utils.model.prompt import MemorySpan


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSpan:
    """One span's latents and what they cost.

    Attributes:
        latents_ND: [n, D] on the CPU.
        num_tokens: Encoder tokens.
        cached_tokens: Those whose latents came from the cache.
        milliseconds: Encoding time of the batch it was in.
    """

    latents_ND: torch.Tensor
    num_tokens: int
    cached_tokens: int
    milliseconds: float


@dataclass(slots=True, eq=False)
class _Job:
    spans: Sequence[MemorySpan]
    salt: bytes
    done: Future[list[EncodedSpan]] = field(default_factory=Future)

    @property
    def num_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans)


class EncoderQueue:
    """A bounded queue in front of one compressor.

    Args:
        compressor: Encodes; only its `encode_spans` is used.
        max_waiting: Requests that may wait.
        max_batch_tokens: Tokens encoded together; one request may be longer.
        on_batch: Told the number of requests of each batch and its seconds.
    """

    def __init__(
        self,
        compressor: Compressor,
        max_waiting: int,
        max_batch_tokens: int,
        on_batch: Callable[[int, float], None] = lambda requests, seconds: None,
    ) -> None:
        self._compressor = compressor
        self._max_waiting = max_waiting
        self._max_batch_tokens = max_batch_tokens
        self._on_batch = on_batch
        self._lock = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._is_working = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    @property
    def num_waiting(self) -> int:
        """Requests that wait now."""
        return len(self._jobs)

    async def encode(self, spans: Sequence[MemorySpan], salt: bytes = b"") -> list[EncodedSpan]:
        """Encode one request's spans, in order.

        Args:
            spans: What to encode.
            salt: Whose they are, see `SpanEncoder.encode`.

        Raises:
            ApiError: 429, too many requests wait.
            Exception: What the encoder raised.
        """
        job = _Job(spans, salt)
        with self._lock:
            if len(self._jobs) >= self._max_waiting:
                raise ApiError(
                    429, f"{len(self._jobs)} requests wait for the encoder: try again later",
                    headers={"Retry-After": "1"},
                )  # fmt: skip
            self._jobs.append(job)
            if not self._is_working:
                self._is_working = True
                self._thread.submit(self._work)
        try:
            return await asyncio.wrap_future(job.done)
        finally:
            # One that has been left makes room for another at once.
            with self._lock, contextlib.suppress(ValueError):
                self._jobs.remove(job)

    def close(self) -> None:
        """Let the running batch end and start no other."""
        with self._lock:
            for job in self._jobs:
                job.done.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _work(self) -> None:
        """What the thread does until no job is left."""
        while batch := self._take_batch():
            self._encode(batch)

    def _encode(self, batch: list[_Job], *, may_pause: bool = True) -> None:
        is_long = sum(job.num_tokens for job in batch) > self._max_batch_tokens

        def stopped() -> bool:
            if is_long and may_pause and (short := self._take_batch(only_short=True)):
                self._encode(short, may_pause=False)
            return all(job.done.done() for job in batch)

        started = time.perf_counter()
        spans = [span for job in batch for span in job.spans]
        salts = [job.salt for job in batch for _ in job.spans]
        try:
            encoded = self._compressor.encode_spans(spans, salts, stopped)
        except EncodingStopped:
            return
        except Exception as error:  # whatever it is, it belongs to the requests of this batch and not to the queue
            for job in batch:
                with contextlib.suppress(InvalidStateError):  # its client has gone
                    job.done.set_exception(error)
            return
        seconds = time.perf_counter() - started
        self._on_batch(len(batch), seconds)
        results = iter(zip(spans, encoded, strict=True))
        for job in batch:
            own = [
                EncodedSpan(
                    latents_ND=latents,
                    num_tokens=len(span.token_ids),
                    cached_tokens=cached,
                    milliseconds=seconds * 1e3,
                )
                for span, (latents, cached) in (next(results) for _ in job.spans)
            ]
            with contextlib.suppress(InvalidStateError):
                job.done.set_result(own)

    def _take_batch(self, *, only_short: bool = False) -> list[_Job]:
        """The next jobs up to the token limit, but one at least; those whose client has gone are dropped.

        Args:
            only_short: Pass over the jobs that are longer than a batch.
        """
        batch: list[_Job] = []
        num_tokens = 0
        with self._lock:
            for job in [*self._jobs]:
                if job.done.done():
                    self._jobs.remove(job)
                    continue
                if only_short and job.num_tokens > self._max_batch_tokens:
                    continue
                if batch and num_tokens + job.num_tokens > self._max_batch_tokens:
                    break
                self._jobs.remove(job)
                batch.append(job)
                num_tokens += job.num_tokens
            if not batch and not only_short:
                self._is_working = False
        return batch
