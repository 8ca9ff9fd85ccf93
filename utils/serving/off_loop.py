"""Work on long bodies in a thread, so that the event loop goes on answering others; short work stays where it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

# What takes a few hundred microseconds; going to a thread and back costs about as much.
LONG_BYTES = 64 << 10


class OffLoop:
    """One thread: several would take Python's lock from the event loop in turns.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do it in the thread; not at all where the caller is cancelled before its turn."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run_if_long(self, size_bytes: int, work: Callable[[], Result]) -> Result:
        """Do it in the thread where it is long."""
        return await self.run(work) if size_bytes > LONG_BYTES else work()
