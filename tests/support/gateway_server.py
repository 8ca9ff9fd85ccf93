"""A gateway on a real socket in this process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

# Tests that start a gateway are skipped where what it is made of is not installed.
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("orjson")
pytest.importorskip("prometheus_client")
pytest.importorskip("pybase64")
pytest.importorskip("uvicorn")

from utils.serving.app import Gateway
from utils.serving.backend import Backend
from utils.serving.server import GatewayServer
from utils.serving.settings import ConnectionLimits, GatewaySettings
from utils.serving.upstream import Upstream


@contextlib.contextmanager
def running(compressor: Any, backend: str | Backend, **settings: Any) -> Iterator[str]:
    """Serve until the block ends, in front of a server's address or a backend in this process; yields the address."""
    settings = {"connections": ConnectionLimits(shutdown_s=5)} | settings
    if isinstance(backend, str):
        settings["backend_url"] = backend
    wanted = GatewaySettings(**settings)
    behind = Upstream(wanted) if isinstance(backend, str) else backend
    with serving(Gateway(wanted, compressor, behind).app(), wanted.connections) as url:
        yield url


@contextlib.contextmanager
def serving(app: Any, limits: ConnectionLimits) -> Iterator[str]:
    """Serve any application in a thread until the block ends; yields the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = GatewayServer(app, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
