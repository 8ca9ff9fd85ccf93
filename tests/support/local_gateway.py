"""A gateway whose backend is the checkpoint's decoder in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.support import gateway_server
from utils.checkpoint.settings import EncoderSettings
from utils.compress.compressor import Compressor
from utils.serving.local_backend import LOCAL_URL, LocalBackend
from utils.serving.local_decoder import LocalDecoder


@contextlib.contextmanager
def running(compressor: Compressor, max_waiting: int = 256, device: str = "cpu", **settings: Any) -> Iterator[str]:
    """Serve until the block ends; yields the address."""
    decoder = LocalDecoder.load(compressor.files, EncoderSettings(device=device, dtype=compressor.dtype))
    backend = LocalBackend(decoder, max_waiting)
    with gateway_server.running(compressor, LOCAL_URL, backend=backend, **settings) as url:
        yield url
