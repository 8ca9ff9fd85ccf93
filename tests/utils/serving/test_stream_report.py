"""A stream's events go on as they came, but for the one with the usage, which tells what was compressed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("orjson")

from utils.serving.rewriter import CompressedRequest
from utils.serving.stream_report import stream_with_report, wants_report

REQUEST = CompressedRequest(path="/chat/completions", body={"stream_options": {"include_usage": True}}, is_ours=True)
TOLD = {"code_llava": json.loads(json.dumps(REQUEST.report()))}
TEXT = b'data: {"choices": [{"delta": {"content": "\\"choices\\":[]"}}]}'
USAGE = b'data: {"choices":[],"usage":{"total_tokens":5}}'


def passed(stream: bytes, size: int) -> list[bytes]:
    closed = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            for at in range(0, len(stream), size):
                yield stream[at : at + size]
        finally:
            closed.append(True)

    async def run() -> list[bytes]:
        return [piece async for piece in stream_with_report(pieces(), REQUEST)]

    got = asyncio.run(run())
    assert closed == [True]
    return got


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_usage_has_the_report(size: int, end: bytes) -> None:
    got = b"".join(passed(TEXT + end + USAGE + end + b"data: [DONE]" + end, size))
    first, usage, done, rest = got.split(end)
    assert (first, done, rest) == (TEXT, b"data: [DONE]", b"")
    assert json.loads(usage.removeprefix(b"data: ")) == {"choices": [], "usage": {"total_tokens": 5}} | TOLD


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"data: ",
        TEXT + b"\n\n",
        b'data: {"choices":[]\n\n',
        b'data: [{"choices":[]}]\n\n',
        b": choices\n\n",
        b"x" * 3_000_000,
    ],
)
def test_anything_else_passes_byte_for_byte(stream: bytes) -> None:
    assert b"".join(passed(stream, 65536)) == stream


def test_events_do_not_wait_for_each_other() -> None:
    assert passed(TEXT + b"\n\n" + TEXT + b"\n\n", len(TEXT) + 2) == [TEXT + b"\n\n"] * 2


def test_only_who_asks_for_usage_is_told() -> None:
    assert wants_report(REQUEST)
    for body in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}, {"stream_options": "x"}):
        assert not wants_report(CompressedRequest(path="/chat/completions", body=body, is_ours=True))
    assert not wants_report(CompressedRequest(path="/chat/completions", body=REQUEST.body))
