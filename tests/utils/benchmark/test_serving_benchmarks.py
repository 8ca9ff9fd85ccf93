"""The cache and the gateway benchmark on a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import fake_server
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache

Run = Callable[..., dict[str, Any]]


def test_cache(checkpoints: dict[str, Path], result_of: Run) -> None:
    flags = ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu", "--tokens", "800", "--spans", "3"]
    result = result_of("cache", *flags, "--repeats", 1)
    assert result["cached_tokens"] == result["memory_tokens"] == 800
    assert result["times_faster"] > 1


def test_gateway(checkpoints: dict[str, Path], tmp_path: Path, result_of: Run) -> None:
    from tests.support import gateway_server

    folder = str(checkpoints["lclm"])
    with fake_server.running() as backend, LatentCache.open(tmp_path) as cache:
        with gateway_server.running(Compressor.load(folder, settings=ON_CPU, cache=cache), backend.url) as url:
            flags = ["--checkpoint", folder, "--device", "cpu", "--gateway-url", url, "--backend-url", backend.url]
            result = result_of("gateway", *flags, "--clients", 1, 3, "--requests", 2, "--lines", 4)
        ways = {name: figures["requests"] for name, figures in result["latency"].items()}
        assert ways == {
            "1 clients, direct": 2,
            "1 clients, gateway": 2,
            "3 clients, direct": 6,
            "3 clients, gateway": 6,
        }
        sent = [body["prompt_embeds"] for _, body in backend.requests if body["max_tokens"] == 1]
        # One probe row; each client's rows are the same on both ways.
        assert len(set(sent)) == 1 + 3
