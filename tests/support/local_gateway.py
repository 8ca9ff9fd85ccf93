"""A gateway whose backend is the checkpoint's decoder in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.support import gateway_server
from utils.checkpoint.settings import EncoderSettings
from utils.compress.compressor import Compressor
from utils.serving.local import LocalBackend


@contextlib.contextmanager
def running(compressor: Compressor, max_waiting: int = 256, device: str = "cpu", **settings: Any) -> Iterator[str]:
    """Serve until the block ends; yields the address."""
    encoder = EncoderSettings(device=device, dtype=compressor.dtype)
    backend = LocalBackend.load(compressor.files, encoder, max_waiting)
    with gateway_server.running(compressor, backend, **settings) as url:
        yield url
