"""What the gateway's tests share: a tiny checkpoint with a cache, and a server that plays vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import fake_server, gateway_server
from tests.support.fake_server import FakeServer
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache


@pytest.fixture(scope="module")
def compressor(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compressor]:
    with LatentCache.open(tmp_path_factory.mktemp("cache")) as cache:
        yield Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server.running() as running:
        yield running


@pytest.fixture
def backend(server: FakeServer) -> FakeServer:
    """The module's server, as new."""
    server.forget(fake_server.answer("fine"))
    return server


@pytest.fixture(scope="module")
def url(compressor: Compressor, server: FakeServer) -> Iterator[str]:
    with gateway_server.running(compressor, server.url) as address:
        yield address


@pytest.fixture
def gateway(url: str, backend: FakeServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20, headers={"Content-Type": "application/json"}) as client:
        yield client
