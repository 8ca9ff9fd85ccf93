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

import uvicorn

from utils.serving.app import create_app
from utils.serving.settings import GatewaySettings


@contextlib.contextmanager
def running(compressor: Any, backend_url: str, *, backend: Any = None, **settings: Any) -> Iterator[str]:
    """Serve until the block ends; yields the address."""
    app = create_app(GatewaySettings(backend_url=backend_url, **settings), compressor, backend)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
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
