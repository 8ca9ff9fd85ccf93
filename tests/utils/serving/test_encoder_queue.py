"""The queue in front of the encoder: who has left costs nothing, and who asks much does not hold up the rest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("orjson")

from utils.compress.span_encoder import EncodingStopped
from utils.model.prompt import MemorySpan
from utils.serving.api_error import ApiError
from utils.serving.encoder_queue import EncoderQueue

LONG = 100


class Steps:
    """An encoder that takes a step a token, each when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.steps = threading.Semaphore(0)
        self.began = threading.Event()
        self.num_steps = 0
        self.was_stopped = threading.Event()

    def encode_spans(
        self, spans: Sequence[MemorySpan], salts: Sequence[bytes], stopped: Callable[[], bool]
    ) -> list[tuple[torch.Tensor, int]]:
        self.batches.append([len(span.token_ids) for span in spans])
        self.began.set()
        for _ in range(sum(self.batches[-1])):
            if stopped():
                self.was_stopped.set()
                raise EncodingStopped
            assert self.steps.acquire(timeout=20)
            self.num_steps += 1
        return [(torch.zeros(1, 2), 0) for _ in spans]


def span(num_tokens: int) -> MemorySpan:
    return MemorySpan(text="", token_ids=[1] * num_tokens, start=0, stop=1, chunk_size=num_tokens)


def run(scenario: Callable[[EncoderQueue, Any], Any], max_waiting: int = 8) -> Steps:
    encoder: Any = Steps()

    async def whole() -> None:
        queue = EncoderQueue(encoder, max_waiting, max_batch_tokens=LONG - 1)
        try:
            await asyncio.wait_for(scenario(queue, encoder), 20)
        finally:
            encoder.steps.release(10_000)
            queue.close()

    asyncio.run(whole())
    return encoder


async def begun(encoder: Steps) -> None:
    while not encoder.began.is_set():
        await asyncio.sleep(0.001)


async def left(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_who_leaves_the_line_is_not_encoded_and_makes_room() -> None:
    async def scenario(queue: EncoderQueue, encoder: Steps) -> None:
        first = asyncio.create_task(queue.encode([span(1)]))
        await begun(encoder)
        waiting = [asyncio.create_task(queue.encode([span(number)])) for number in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as error:
            await queue.encode([span(4)])
        assert error.value.status == 429
        await left(waiting[0])
        assert queue.num_waiting == 1
        last = asyncio.create_task(queue.encode([span(5)]))
        await asyncio.sleep(0)
        encoder.steps.release(1 + 3 + 5)
        await asyncio.gather(first, waiting[1], last)

    assert run(scenario, max_waiting=2).batches == [[1], [3, 5]]


def test_encoding_stops_when_no_one_waits() -> None:
    async def scenario(queue: EncoderQueue, encoder: Steps) -> None:
        alone = asyncio.create_task(queue.encode([span(50)]))
        await begun(encoder)
        encoder.steps.release(3)
        await left(alone)
        encoder.steps.release(1)
        next_one = asyncio.create_task(queue.encode([span(1)]))
        while not encoder.was_stopped.is_set():
            await asyncio.sleep(0.001)
        encoder.steps.release(1)
        await next_one

    encoder = run(scenario)
    assert encoder.num_steps <= 6
    assert encoder.batches == [[50], [1]]


def test_encoding_goes_on_while_one_waits() -> None:
    async def scenario(queue: EncoderQueue, encoder: Steps) -> None:
        first = asyncio.create_task(queue.encode([span(1)]))
        await begun(encoder)
        two = [asyncio.create_task(queue.encode([span(10)])) for _ in range(2)]
        await asyncio.sleep(0)
        encoder.steps.release(1)
        await first
        while queue.num_waiting:
            await asyncio.sleep(0.001)
        await left(two[0])
        encoder.steps.release(20)
        await two[1]

    assert run(scenario).batches == [[1], [10, 10]]


def test_short_requests_pass_a_long_one() -> None:
    async def scenario(queue: EncoderQueue, encoder: Steps) -> None:
        long = asyncio.create_task(queue.encode([span(LONG)]))
        await begun(encoder)
        other_long = asyncio.create_task(queue.encode([span(LONG + 1)]))
        short = [asyncio.create_task(queue.encode([span(number)])) for number in (2, 3)]
        await asyncio.sleep(0)
        encoder.steps.release(1 + 2 + 3)
        await asyncio.gather(*short)
        assert not long.done()
        assert encoder.num_steps <= 1 + 2 + 3
        encoder.steps.release(LONG + LONG)
        await asyncio.gather(long, other_long)

    assert run(scenario).batches == [[LONG], [2, 3], [LONG + 1]]


def test_an_error_belongs_to_its_batch() -> None:
    class Failing:
        def encode_spans(self, spans: Any, *_: Any) -> Any:
            if len(spans) == 2:
                raise ValueError("two")
            return [(torch.zeros(1, 2), 0)]

    async def scenario() -> None:
        failing: Any = Failing()
        queue = EncoderQueue(failing, 8, 100)
        with pytest.raises(ValueError, match="two"):
            await queue.encode([span(1), span(1)])
        assert len(await queue.encode([span(1)])) == 1
        queue.close()

    asyncio.run(scenario())
