"""A compressor whose encoder fails."""

from __future__ import annotations

from typing import Any

from utils.compress.compressor import Compressor


def failing(compressor: Compressor) -> Any:
    """The same compressor, but for its encoder, which runs out of memory."""

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(compressor, name)

        def encode_spans(self, *_: Any) -> Any:
            raise RuntimeError("out of memory")

    return Failing()
