"""A gateway under mixed load for a while: its memory stays flat."""

from __future__ import annotations

import random
import statistics
import threading
import time
from pathlib import Path

import httpx

from tests.campaign.api_grammar import KEYS, Grammar
from tests.campaign.figures import Figures
from tests.campaign.gateways import RunningGateway, ask_the_canary, running
from tests.campaign.jobs import Tools
from tests.support.prompts import CHAT, chat_body
from utils.model.markers import wrap

_CLIENTS = 3
# Allocators keep some of what was once used; a leak of 1 KB a request is far more.
_GROWTH_BYTES = 32 << 20


def run(work: Path, tools: Tools, minutes: float, seed: int) -> Figures:
    """Load a gateway with chats about ever new memories, streams, stored texts and hostile requests."""
    figures = Figures("memory under load")
    with running(tools, work) as gateway:
        wanted = ask_the_canary(gateway)
        end, lock = time.monotonic() + 60 * minutes, threading.Lock()
        threads = [
            threading.Thread(target=_client, args=(gateway, end, seed * 1000 + number, figures, lock))
            for number in range(_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        samples = []
        while time.monotonic() < end:
            time.sleep(min(1.0, minutes * 60 / 100))
            samples.append(gateway.resident_bytes())
        for thread in threads:
            thread.join()
        # The first third fills caches and pools: the gateway keeps up to so many stored texts and tokenised ones.
        third = len(samples) // 3
        before, after = (statistics.median(part) for part in (samples[third : 2 * third], samples[2 * third :]))
        figures.notes.append(f"{before / 2**20:.0f} MiB in its second third, {after / 2**20:.0f} in its last")
        if after - before > _GROWTH_BYTES:
            figures.failures.append(f"seed {seed}: {before / 2**20:.0f} MiB became {after / 2**20:.0f}")
        if (said := ask_the_canary(gateway)) != wanted:
            figures.failures.append(f"seed {seed}: the canary answers {said!r}, not {wanted!r}")
        figures.failures += [f"seed {seed}: {complaint}" for complaint in gateway.complaints()]
    return figures


def _client(gateway: RunningGateway, end: float, seed: int, figures: Figures, lock: threading.Lock) -> None:
    chance, grammar = random.Random(seed), Grammar(seed)
    headers = {"Authorization": f"Bearer {KEYS[seed % 2]}"}
    with httpx.Client(base_url=gateway.url, timeout=60, headers=headers) as client:
        while time.monotonic() < end:
            kind = chance.choice(["new memory", "new memory", "stream", "stored text", "hostile"])
            text = "".join(f"value_{chance.random()} = {chance.random()}\n" for _ in range(chance.randint(1, 6)))
            try:
                if kind == "hostile":
                    request = grammar.request()
                    client.request(request.method, request.path, content=request.body, headers=request.headers)
                elif kind == "stored text":
                    client.post("/v1/memories", json={"text": text})
                else:
                    body = chat_body(f"{wrap(text)} Which?", max_tokens=4, stream=kind == "stream")
                    client.post(CHAT, json=body).raise_for_status()
                complaint = None
            except httpx.HTTPError as error:
                complaint = f"client {seed}, {kind}: {type(error).__name__}: {error}"
            with lock:
                figures.add(kind, complaint)
