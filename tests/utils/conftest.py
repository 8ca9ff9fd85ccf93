"""One real vLLM server for all tests that want it, and the checkpoint whose decoder it serves, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from utils.checkpoint.settings import EncoderSettings

FLOAT32 = EncoderSettings(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def default_checkpoint() -> Path:
    """The embedded default checkpoint, assembled if it is not there."""
    from tests.support.marks import needs_default_checkpoint
    from utils.checkpoint.default.assemble import assemble_default_checkpoint

    needs_default_checkpoint()
    return assemble_default_checkpoint()


@pytest.fixture(scope="session")
def vllm_url(default_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a vLLM server with the default checkpoint's decoder, served as `tiny`; starting it takes minutes."""
    from tests.support import vllm_server

    with vllm_server.running(default_checkpoint / "llm", tmp_path_factory.mktemp("vllm") / "server.log") as url:
        yield url


@pytest.fixture(scope="session")
def default_compressor(default_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The default checkpoint's compressor in float32, chunk size 8, with a cache of its own."""
    from utils.compress.compressor import Compressor
    from utils.compress.latent_cache import LatentCache

    with LatentCache.open(tmp_path_factory.mktemp("cache")) as cache:
        yield Compressor.load(default_checkpoint, settings=FLOAT32, chunk_size=8, cache=cache)


@pytest.fixture(scope="session")
def decoder(default_checkpoint: Path) -> Any:
    """The default checkpoint's decoder in float32, in this process."""
    from utils.checkpoint.load import load_decoder
    from utils.checkpoint.locate import find_checkpoint

    return load_decoder(find_checkpoint(default_checkpoint, 8), FLOAT32).eval()
