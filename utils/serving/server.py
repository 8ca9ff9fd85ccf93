"""uvicorn as the gateway runs it: places for connections as the open files allow, and an end in time.

After SIGTERM running answers get some seconds, then they are cut; a thread that hangs cannot keep the process alive.
What a single connection may do is in `utils/serving/connection.py`. This file knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.cli import EXIT_INTERRUPTED, EXIT_OK
from utils.serving.connection import Connection
from utils.serving.settings import ConnectionLimits

if sys.platform == "win32":
    _FILES = 0
else:
    import resource

    _FILES = resource.RLIMIT_NOFILE

logger = logging.getLogger(__name__)

_SWEEP_S = 0.1
_MAX_HEADER_BYTES = 32 << 10
# Threads that still work get this long after the last answer has ended or was cut.
_THREADS_END_S = 3.0
# Answers that were cut get this long to notice.
_NOTICE_S = 2.0
# Connections that the kernel holds until they are taken: those beyond are tried again by their clients after a second.
_QUEUE = 1024
# Files, database, standard streams: everything that is no connection.
_OTHER_FILES = 64


class GatewayServer(uvicorn.Server):
    """One server.

    Args:
        app: What is served.
        limits: Deadlines and number of connections.
        host: Address to listen on.
        port: Port to listen on.
    """

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, host: str = "127.0.0.1", port: int = 0) -> None:
        max_files = raise_open_files()
        # asyncio takes up to `backlog` connections at once, several times before the first of them is counted by
        # `Connection`.
        backlog = min(1024, max(max_files // 16, 8))
        # Each request in work may hold a connection to the backend, too.
        places = max((max_files - 5 * backlog - _OTHER_FILES) // 2, 4)
        self._app = app
        self._limits = limits
        self._signal: int | None = None
        self._end_now: Callable[[int], object] = lambda code: None
        self._asked_to_end = threading.Event()
        self._answers_ended = threading.Event()
        protocol = functools.partial(
            Connection, limits=limits, max_connections=min(limits.max_connections, places), quiet={}
        )
        config = uvicorn.Config(
            self._serve_until_cut, interface="asgi3", host=host, port=port, log_level="warning", access_log=False,
            server_header=False, http=cast(Any, protocol), ws="none", backlog=backlog,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_keep_alive=math.ceil(limits.keep_alive_s),
            timeout_graceful_shutdown=math.ceil(limits.shutdown_s + _NOTICE_S / 2),
        )  # fmt: skip
        super().__init__(config)

    def run_process(self, end_now: Callable[[int], object]) -> int:
        """Serve until SIGTERM or Ctrl-C, and end the process in time whatever still runs.

        Args:
            end_now: Ends the process with an exit code and waits for nothing, as `os._exit` does.

        Returns:
            The process's exit code.
        """
        self._end_now = end_now
        threading.Thread(target=self._end_in_time, daemon=True).start()
        self.run()
        return self._exit_code()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does; it may interrupt anything, so nothing here takes a lock that others hold."""
        if self._signal is not None:
            self._end_now(128 + sig)
        self._signal = sig
        self.should_exit = True
        self._asked_to_end.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                with listener.dup() as again:
                    again.listen(_QUEUE)
        self._sweeper = asyncio.create_task(self._sweep())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what waits for its client at once; let running answers finish, then cut them."""
        cut = asyncio.get_running_loop().call_later(self._limits.shutdown_s, self._cut)
        await super().shutdown(sockets)
        cut.cancel()
        self._sweeper.cancel()

    async def _serve_until_cut(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting_receive() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._answers_ended.set()
            return message

        if scope["type"] == "lifespan":
            await self._app(scope, noting_receive, send)
            return
        # Only the end cancels a request, when its client has been cut off already: nothing to report.
        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, receive, send)

    def _cut(self) -> None:
        # To the application this is a client that goes away: it ends its work and the backend's.
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = loop.time()
            for connection in list(self.server_state.connections):
                cast(Connection, connection).close_if_late(now)

    def _exit_code(self) -> int:
        return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_OK

    def _end_in_time(self) -> None:
        """Python itself waits for its threads at the end: an encoder batch or a long prefill could take minutes."""
        self._asked_to_end.wait()
        if sys.platform != "win32":
            # Should a thread hold Python's own lock, the kernel ends the process.
            signal.alarm(math.ceil(self._limits.shutdown_s + _NOTICE_S + _THREADS_END_S + 2))
        self._answers_ended.wait(self._limits.shutdown_s + _NOTICE_S)
        time.sleep(_THREADS_END_S)
        # In a thread of its own: whoever reads our log may have stopped.
        last_words = threading.Thread(target=_say_unfinished, daemon=True)
        last_words.start()
        last_words.join(1.0)
        self._end_now(self._exit_code())


def raise_open_files(wanted: int = 1 << 16) -> int:
    """Raise this process's limit of open files towards the most it may have.

    Returns:
        The limit now; `wanted` where the system has none.
    """
    if sys.platform == "win32":
        return wanted
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(_FILES))
    # macOS names no hard limit, but refuses more than 10240.
    for target in (min(wanted, hard), min(10240, hard)):
        if soft >= target:
            break
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(_FILES, (target, resource.getrlimit(_FILES)[1]))
            return target
    return min(soft, wanted)


def _say_unfinished() -> None:
    logger.warning("the time to end is over: the process ends with work unfinished")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
