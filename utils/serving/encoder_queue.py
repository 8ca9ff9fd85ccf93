"""Encodes the memory spans of concurrent requests together, in one thread beside the event loop.

    queue = EncoderQueue(compressor, max_waiting=256, max_batch_tokens=32768)
    encoded = await queue.encode(spans)           # latents, cached tokens and milliseconds of each span

While one batch is encoded, requests gather for the next: batching costs an idle gateway no waiting time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.serving.api_error import ApiError

if TYPE_CHECKING:
    import torch

    from utils.inference.compressor import Compressor
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

    def report(self) -> dict[str, Any]:
        """What an answer says about the span."""
        return {
            "tokens": self.num_tokens,
            "latents": len(self.latents_ND),
            "cached_tokens": self.cached_tokens,
            "milliseconds": round(self.milliseconds, 2),
        }


@dataclass(slots=True)
class _Job:
    spans: Sequence[MemorySpan]
    done: asyncio.Future[list[EncodedSpan]]

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
        self._jobs: deque[_Job] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    @property
    def num_waiting(self) -> int:
        """Requests that wait now."""
        return len(self._jobs)

    async def encode(self, spans: Sequence[MemorySpan]) -> list[EncodedSpan]:
        """Encode one request's spans, in order.

        Raises:
            ApiError: 429, too many requests wait.
            Exception: What the encoder raised.
        """
        if len(self._jobs) >= self._max_waiting:
            raise ApiError(
                429, f"{len(self._jobs)} requests wait for the encoder: try again later", headers={"Retry-After": "1"}
            )
        job = _Job(spans, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.done

    def close(self) -> None:
        """Let the running batch end and start no other."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _work(self) -> None:
        while self._jobs:
            batch = self._take_batch()
            if not batch:
                continue
            started = time.perf_counter()
            spans = [span for job in batch for span in job.spans]
            try:
                encoded = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._compressor.encode_spans, spans
                )
            except Exception as error:  # whatever it is, it belongs to the requests of this batch and not to the queue
                for job in batch:
                    if not job.done.done():
                        job.done.set_exception(error)
                continue
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
                if not job.done.done():
                    job.done.set_result(own)

    def _take_batch(self) -> list[_Job]:
        """Waiting jobs up to the token limit, at least one; those whose client has gone are dropped."""
        batch: list[_Job] = []
        num_tokens = 0
        while self._jobs:
            job = self._jobs[0]
            if job.done.done():
                self._jobs.popleft()
                continue
            if batch and num_tokens + job.num_tokens > self._max_batch_tokens:
                break
            batch.append(self._jobs.popleft())
            num_tokens += job.num_tokens
        return batch
