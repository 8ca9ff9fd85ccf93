"""The gateway under load and in trouble: many clients, a backend that is killed, two gateways on one cache."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import fake_server, gateway_server, prompts
from tests.support.fake_server import Handler
from tests.support.prompts import CHAT
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.compress.prompt_embeds import encode_wire
from utils.model.markers import MEMORY_START, wrap

NUM_CLIENTS = 100


def secret(number: int) -> str:
    return f"the secret of client {number} is {number * 7919}"


def chat_body(number: int, **fields: Any) -> dict[str, Any]:
    return prompts.chat_body(f"{number}: {wrap(secret(number))}", model="tiny", **fields)


def digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def echo_digest(handler: Handler) -> None:
    """Answer with a digest of exactly what came in this request."""
    body = json.loads(handler.body)
    text, part, _ = body["messages"][0]["content"]
    said = digest(text["text"], part["data"])
    if body.get("stream"):
        fake_server.stream(said[:20], said[20:])(handler)
    else:
        message = {"role": "assistant", "content": said}
        handler.reply(200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})


def expected_digest(compressor: Compressor, number: int) -> str:
    prompt = compressor.parse_raw(wrap(secret(number)))
    ((latents, _),) = compressor.encode_spans(prompt.spans)
    return digest(f"{number}: {MEMORY_START}", encode_wire(latents, compressor.dtype))


async def ask(client: httpx.AsyncClient, number: int, stream: bool) -> str:
    got = await client.post(CHAT, json=chat_body(number, stream=stream))
    assert got.status_code == 200, got.text
    if not stream:
        return str(got.json()["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


@pytest.mark.slow
def test_a_hundred_clients_get_their_own_answers(compressor: Compressor) -> None:
    async def everyone(url: str) -> list[list[str]]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:

            async def client(number: int) -> list[str]:
                return [await ask(http, number, stream=round_number % 2 == 1) for round_number in range(4)]

            return await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))

    with fake_server.running() as backend:
        backend.default_action = echo_digest
        with gateway_server.running(compressor, backend.url) as url:
            answers = asyncio.run(everyone(url))
        assert len(backend.requests) == 4 * NUM_CLIENTS
    for number, said in enumerate(answers):
        assert said == [expected_digest(compressor, number)] * 4
    assert len({said[0] for said in answers}) == NUM_CLIENTS


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(compressor: Compressor) -> None:
    async def many(url: str, numbers: range) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            for at in range(numbers.start, numbers.stop, 20):
                await asyncio.gather(*(ask(http, number % 50, stream=number % 2 == 1) for number in range(at, at + 20)))

    with fake_server.running() as backend:
        backend.default_action = echo_digest
        backend.keeps_requests = False
        with gateway_server.running(compressor, backend.url) as url:
            asyncio.run(many(url, range(500)))  # pools, caches and arenas fill
            before = resident_bytes()
            asyncio.run(many(url, range(2000)))
            grown = resident_bytes() - before
    assert grown < 16 << 20, f"{grown >> 10} KiB more after 2000 requests"


def test_a_backend_that_is_killed_in_a_stream_and_comes_back(compressor: Compressor) -> None:
    with fake_server.running() as first:
        port = first.server_address[1]
        first.script = [fake_server.stream("begin", then=lambda handler: handler.reset())]
        with gateway_server.running(compressor, first.url) as url, httpx.Client(base_url=url, timeout=20) as gateway:
            broken = gateway.post(CHAT, json=chat_body(1, stream=True)).text
            assert "begin" in broken
            assert '"error"' in broken
            assert "[DONE]" not in broken
            first.shutdown()
            first.server_close()
            assert gateway.post(CHAT, json=chat_body(1)).status_code == 502
            with fake_server.running(port=port) as second:
                answered = gateway.post(CHAT, json=chat_body(1))
                assert answered.status_code == 200
                assert answered.json()["code_llava"]["cached_tokens"] == answered.json()["code_llava"]["memory_tokens"]
                assert len(second.requests) == 1


@pytest.mark.slow
def test_two_gateways_share_one_cache(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with fake_server.running() as backend, LatentCache.open(tmp_path) as one, LatentCache.open(tmp_path) as two:
        reports, sent = [], []
        for cache in (one, two, one):
            compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)
            with gateway_server.running(compressor, backend.url) as url:
                reports.append(httpx.post(url + CHAT, json=chat_body(7)).json()["code_llava"])
            sent.append(backend.requests[-1][1]["messages"])
    tokens = reports[0]["memory_tokens"]
    assert [report["cached_tokens"] for report in reports] == [0, tokens, tokens]
    assert sent[0] == sent[1] == sent[2]


@pytest.mark.slow
def test_a_damaged_cache_and_a_full_disk_change_no_answer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    with fake_server.running() as backend, LatentCache.open(tmp_path) as cache:
        compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)
        with gateway_server.running(compressor, backend.url) as url:

            def cached_tokens(number: int) -> int:
                backend.script = [echo_digest]
                got = httpx.post(url + CHAT, json=chat_body(number)).raise_for_status().json()
                assert got["choices"][0]["message"]["content"] == expected_digest(plain, number)
                return int(got["code_llava"]["cached_tokens"])

            assert [cached_tokens(1) > 0 for _ in range(2)] == [False, True]
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            for file in files:
                file.write_bytes(b"\xa5" * file.stat().st_size)
            assert [cached_tokens(1) > 0 for _ in range(2)] == [False, True]
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            try:
                assert [cached_tokens(number) for number in (*range(2, 40), 2)] == [0] * 39
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert [cached_tokens(50) > 0 for _ in range(2)] == [False, True]
