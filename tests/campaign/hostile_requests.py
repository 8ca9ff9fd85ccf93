"""Hostile requests: every one is answered soon and in the API's shape, and nobody else notices."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx

from tests.campaign.api_grammar import KEYS, Grammar, Request
from tests.campaign.figures import Figures
from tests.campaign.gateways import RunningGateway, ask_the_canary, running
from tests.campaign.jobs import Tools
from tests.support import fake_server

LONGEST_S = 20.0
_AT_ONCE = 4
_LOG_BYTES = 200
_FAULTS = ("error500", "garbage", "html", "drop", "other_json")
# What a request can be told; 502 where a server behind fails, 503 and 429 with a time to come back.
_FINE = {200, 201, 204, 400, 401, 403, 404, 405, 408, 413, 414, 415, 417, 422, 429, 431, 503}


def run(work: Path, tools: Tools, count: int, seed: int) -> list[Figures]:
    """Ask a gateway with its own decoder, and one in front of a server that fails, each so many requests."""
    figures = []
    with running(tools, work / "local") as gateway:
        figures.append(_attack(gateway, "requests: local decoder", count, seed, _FINE))
    with fake_server.running(fake_server.faulty(*_FAULTS, otherwise=fake_server.answer("fine"))) as server:
        server.keeps_requests = False
        with running(tools, work / "server", "--timeout", "5", backend_url=server.url) as gateway:
            figures.append(_attack(gateway, "requests: a failing server", count, seed + 1, {*_FINE, 500, 502}))
    return figures


def _attack(gateway: RunningGateway, part: str, count: int, seed: int, fine: set[int]) -> Figures:
    figures, grammar = Figures(part), Grammar(seed)
    wanted = ask_the_canary(gateway)
    text = {"text": "def stored():\n    return 4\n"}
    stored = httpx.post(f"{gateway.url}/v1/memories", json=text, headers={"Authorization": f"Bearer {KEYS[0]}"})
    grammar.memories.append(stored.json()["id"])
    requests = [grammar.request() for _ in range(count)]

    async def everyone() -> None:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=2 * LONGEST_S) as client:
            numbered = iter(enumerate(requests))

            async def one() -> None:
                for number, request in numbered:
                    await _ask(client, request, f"{part}, seed {seed}, request {number}", fine, figures)

            await asyncio.gather(*(one() for _ in range(_AT_ONCE)))

    asyncio.run(everyone())
    if fine == _FINE and ask_the_canary(gateway) != wanted:
        figures.failures.append(f"{part}, seed {seed}: the canary answers {ask_the_canary(gateway)!r}, not {wanted!r}")
    figures.failures += [f"{part}, seed {seed}: {complaint}" for complaint in gateway.complaints()]
    # What clients say must not fill the disk.
    log_bytes = gateway.log.stat().st_size
    figures.notes.append(f"{log_bytes / count:.0f} bytes of log a request")
    if log_bytes > 10_000 + _LOG_BYTES * count:
        figures.failures.append(f"{part}, seed {seed}: the log has {log_bytes} bytes")
    return figures


async def _ask(client: httpx.AsyncClient, request: Request, where: str, fine: set[int], figures: Figures) -> None:
    began = time.monotonic()
    try:
        got = await client.request(request.method, request.path, content=request.body, headers=request.headers)
    except httpx.HTTPError as error:
        # A broken stream is one way to hear of a server's failure.
        broken = isinstance(error, httpx.RemoteProtocolError) and 502 in fine
        figures.add("broken off", None if broken else f"{where}: {type(error).__name__}: {error}: {request}")
        return
    seconds = time.monotonic() - began
    figures.add("answered" if got.status_code < 400 else "refused" if got.status_code < 500 else "failed behind")
    complaint = _complaint(request, got, fine)
    if complaint is None and seconds > LONGEST_S:
        complaint = f"took {seconds:.0f} s"
    if complaint is not None:
        figures.failures.append(f"{where}: {complaint}: {got.status_code} {got.text[:300]} for {request}"[:2000])


def _complaint(request: Request, got: httpx.Response, fine: set[int]) -> str | None:
    """What is wrong with an answer."""
    if got.status_code not in fine:
        return "this status must not be"
    if got.status_code in (429, 503) and not got.headers.get("Retry-After"):
        return "no time to come back"
    if got.status_code < 400 or request.method == "HEAD":
        return None
    try:
        message = got.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "not an error in the API's shape"
    return None if isinstance(message, str) and 0 < len(message) < 2000 else "a message of another kind"
