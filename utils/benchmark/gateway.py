"""What a running gateway adds to a request: the same prompts through it, and as rows straight to its backend.

Every client asks for one token about its own secret, so that answers cost the backend the same on both ways. The direct
way sends rows that were compressed beforehand; the gateway finds its latents in its cache after the warm-up round. With
`--expand` a third way asks the gateway to keep that share of each memory as text.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from utils.benchmark.measure import markdown_table
from utils.benchmark.sources import load_compressor
from utils.errors import ConfigError
from utils.model.markers import wrap

Ask = Callable[[int], Awaitable[Any]]


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    if min(*args.clients, args.requests, args.lines) < 1:
        raise ConfigError("--clients, --requests and --lines must be at least 1")
    runs = asyncio.run(_measure(args))
    rows, latency = [], {}
    for (clients, way), times in runs.items():
        p50, p95 = (1e3 * _percentile(times, share) for share in (0.5, 0.95))
        rows.append((clients, way, f"{p50:.1f}", f"{p95:.1f}", len(times)))
        latency[f"{clients} clients, {way}"] = {"p50_ms": p50, "p95_ms": p95, "requests": len(times)}
    return markdown_table(("clients", "way", "p50 ms", "p95 ms", "requests"), rows), {"latency": latency}


async def _measure(args: argparse.Namespace) -> dict[tuple[int, str], list[float]]:
    # Here: the other benchmarks' machine may have no HTTP client.
    from utils.client.server_client import VllmClient
    from utils.serving.request_options import EXTENSION

    most = max(args.clients)
    compressor = load_compressor(args)
    texts = [_prompt_text(number, args.lines) for number in range(most)]
    embeds = compressor.compress([compressor.parse_raw(text) for text in texts])
    runs: dict[tuple[int, str], list[float]] = {}
    async with VllmClient(args.gateway_url) as gateway, VllmClient(args.backend_url) as backend:
        await backend.preflight(width=compressor.width)
        one_token: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
        ways: dict[str, Ask] = {
            "direct": lambda number: backend.complete(embeds[number].values_TD, **one_token),
            "gateway": lambda number: gateway.complete(texts[number], **one_token),
        }
        if args.expand:
            expanded = one_token | {EXTENSION: {"expand": args.expand}}
            ways["expanded"] = lambda number: gateway.complete(texts[number], **expanded)
        for ask in ways.values():  # warm-up: the gateway's cache, the backend's prefix cache
            await asyncio.gather(*(ask(number) for number in range(most)))
        for clients in args.clients:
            began, rounds = time.perf_counter(), 0
            while rounds < args.requests or time.perf_counter() - began < args.seconds:
                rounds += 1
                for way, ask in ways.items():
                    times = await asyncio.gather(*(_seconds(ask, number) for number in range(clients)))
                    runs.setdefault((clients, way), []).extend(times)
    return runs


async def _seconds(ask: Ask, number: int) -> float:
    began = time.perf_counter()
    await ask(number)
    return time.perf_counter() - began


def _prompt_text(number: int, lines: int) -> str:
    code = "".join(f"client_{number}_value_{line} = {number * 7919 + line}\n" for line in range(lines))
    return f"{wrap(code)} What is this?"


def _percentile(times: Sequence[float], share: float) -> float:
    """The value below which `share` of the times lie."""
    return statistics.quantiles(times, n=100, method="inclusive")[round(share * 100) - 1] if times[1:] else times[0]
