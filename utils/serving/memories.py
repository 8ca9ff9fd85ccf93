"""Texts that were sent once and are named later: `<|memory_start|>@mem-…<|memory_end|>`.

Ids are random, so that they cannot be guessed; texts live in memory and end with the process.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass

from utils.serving.api_error import ApiError

_REFERENCE = re.compile(r"\s*@(mem-[0-9a-f]{32})\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One stored text.

    Attributes:
        id: What prompts call it.
        text: The text.
        created: Seconds since the epoch.
        size_bytes: Bytes of the text in UTF-8.
    """

    id: str
    text: str
    created: int
    size_bytes: int

    def summary(self) -> dict[str, str | int]:
        """What the API says about it; not the text."""
        return {"id": self.id, "object": "memory", "created": self.created, "bytes": self.size_bytes}


class MemoryStore:
    """Stored texts within limits; it refuses what does not fit and forgets nothing by itself.

    Args:
        max_count: Most texts.
        max_bytes: Most bytes of all texts.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._memories: dict[str, Memory] = {}
        self._size_bytes = 0

    def add(self, text: str) -> Memory:
        """Store a text.

        Raises:
            ApiError: 413, there is no room.
        """
        size = len(text.encode())
        if len(self._memories) >= self._max_count or self._size_bytes + size > self._max_bytes:
            raise ApiError(
                413,
                f"no room for {size} bytes: {len(self._memories)} of {self._max_count} memories and {self._size_bytes} "
                f"of {self._max_bytes} bytes are taken; delete some with DELETE /v1/memories/ID",
            )
        memory = Memory(id=f"mem-{secrets.token_hex(16)}", text=text, created=int(time.time()), size_bytes=size)
        self._memories[memory.id] = memory
        self._size_bytes += size
        return memory

    def list(self) -> list[Memory]:
        """All, the oldest first."""
        return [*self._memories.values()]

    def get(self, memory_id: str) -> Memory:
        """One memory.

        Raises:
            ApiError: 404, there is none of this name.
        """
        try:
            return self._memories[memory_id]
        except KeyError:
            raise ApiError(404, f"no memory {memory_id!r}: it was deleted, or the gateway was restarted") from None

    def delete(self, memory_id: str) -> None:
        """Remove one memory.

        Raises:
            ApiError: 404, there is none of this name.
        """
        self._size_bytes -= self.get(memory_id).size_bytes
        del self._memories[memory_id]

    def resolve(self, span_text: str) -> str:
        """The stored text where a span is a reference, else the span itself.

        Raises:
            ApiError: 404, the reference names nothing.
        """
        match = _REFERENCE.fullmatch(span_text)
        return self.get(match[1]).text if match else span_text
