"""One client's connection: uvicorn's, with deadlines and a limited number of places.

uvicorn by itself waits for ever for the end of headers and for clients that stop reading, and takes connections until
the open files run out. Here each connection has a deadline whenever its client has the next word, or does not read what
it is sent; and when all places are taken, the connection whose client has been silent longest makes room.
"""

from __future__ import annotations

import asyncio
import enum
import math
import sys
from collections.abc import Callable
from typing import Any, cast

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from utils.serving.api_error import error_body
from utils.serving.settings import ConnectionLimits

# What a client may send ahead of an answer; a disconnect can only be seen by reading on.
_MAX_AHEAD_BYTES = 1 << 20
# A client that reads less of a waiting answer within `write_timeout_s` has stopped.
_MIN_READ_BYTES = 16 << 10


class _Turn(enum.Enum):
    """What a connection waits for."""

    IDLE = enum.auto()  # the first byte of a next request
    HEADERS = enum.auto()  # the end of a request's headers
    BODY = enum.auto()  # the end of its body; its deadlines are those of `bodies.py`
    ANSWER = enum.auto()  # the application
    REST = enum.auto()  # the end of a body that nobody reads, since the answer is out
    CLOSING = enum.auto()  # the client, to read the last answer and close


class Connection(H11Protocol):
    """uvicorn's connection with deadlines.

    Args:
        limits: The deadlines.
        max_connections: Places.
        quiet: Connections of this server whose client has the next word, the one that is silent longest first.
        uvicorns: What uvicorn gives its connections.
    """

    def __init__(
        self, *, limits: ConnectionLimits, max_connections: int, quiet: dict[Connection, None], **uvicorns: Any
    ) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._max_connections = max_connections
        self._quiet = quiet
        self._turn = _Turn.IDLE
        self._deadline = math.inf
        self._write_deadline = math.inf
        self._read_bytes = 0
        self._ahead_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        self._socket = transport
        self._wrapped = _Transport(transport, self.close_gently)
        super().connection_made(cast(asyncio.Transport, self._wrapped))
        self._set_turn(_Turn.HEADERS)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, by whoever."""
        super().connection_lost(exc)
        self._quiet.pop(self, None)

    def data_received(self, data: bytes) -> None:
        """The client sends."""
        if self._turn is _Turn.CLOSING:
            return
        if self._turn is _Turn.IDLE:
            self._set_turn(_Turn.HEADERS)
        self._ahead_bytes = self._ahead_bytes + len(data) if self._turn is _Turn.ANSWER else 0
        if self._ahead_bytes > _MAX_AHEAD_BYTES:
            self.transport.abort()
            return
        super().data_received(data)
        self._set_turn(self._turn_after(_Turn.HEADERS))

    def on_response_complete(self) -> None:
        """An answer is out; uvicorn goes on with a request that came ahead, if there is one."""
        super().on_response_complete()
        self._set_turn(self._turn_after(_Turn.IDLE))

    def shutdown(self) -> None:
        """Close now, or after the answer in work."""
        if self._turn is _Turn.ANSWER:
            super().shutdown()
        else:
            self.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn calls it while h11's error is handled."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if "Host:" in str(error):
            # h11 sees a missing or doubled Host before the door does.
            status, error = 403, ValueError("expected one Host header; --allowed-host sets the names it may have")
        self._answer_error(status, f"{msg} {error}")

    def close_if_late(self, now: float) -> None:
        """Close when a deadline has passed."""
        pending_bytes = self._socket.get_write_buffer_size()
        read_bytes = self._wrapped.written_bytes - pending_bytes
        if pending_bytes == 0:
            self._write_deadline = math.inf
        elif self._write_deadline == math.inf or read_bytes - self._read_bytes >= _MIN_READ_BYTES:
            self._read_bytes = read_bytes
            self._write_deadline = now + self._limits.write_timeout_s
        if now > min(self._deadline, self._write_deadline):
            self.abort()

    def abort(self) -> None:
        """Close at once; what was not sent yet is lost."""
        self._socket.abort()

    def close_gently(self) -> None:
        """Close so that the client can read the last answer.

        Closing a socket whose received bytes were not read resets the connection, and the reset may overtake the answer
        ("your body is too long"). So while the client may still be sending, only our direction is closed, and what
        comes is dropped for a short time.
        """
        if self._turn is _Turn.CLOSING or self._socket.is_closing():
            return
        self._set_turn(_Turn.CLOSING)
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            self._deadline = math.inf  # the answer may be long
            self._socket.close()
        else:
            self._socket.write_eof()
            self.flow.resume_reading()

    def _turn_after(self, between_requests: _Turn) -> _Turn:
        if self._turn is _Turn.CLOSING:
            return _Turn.CLOSING
        if self.cycle is not None and not self.cycle.response_complete:
            return _Turn.BODY if self.cycle.more_body else _Turn.ANSWER
        return _Turn.REST if self.conn.their_state is h11.SEND_BODY else between_requests

    def _set_turn(self, turn: _Turn) -> None:
        if turn is not self._turn:
            self._turn = turn
            seconds = {
                _Turn.IDLE: self._limits.keep_alive_s,
                _Turn.HEADERS: self._limits.header_timeout_s,
                _Turn.REST: self._limits.linger_s,
                _Turn.CLOSING: self._limits.linger_s,
            }
            self._deadline = self.loop.time() + seconds.get(turn, math.inf)
        # To the end of the line: the client has just been heard, or answered.
        self._quiet.pop(self, None)
        if turn is not _Turn.ANSWER:
            self._quiet[self] = None

    def _make_room(self) -> None:
        """Let the connections go that are silent longest; this one is the last of them."""
        while len(self.connections) > self._max_connections:
            silent = next(iter(self._quiet))
            if silent is self:
                self._answer_error(503, "all connections are in use: try again later", ((b"retry-after", b"1"),))
                return
            del self._quiet[silent]
            self.connections.discard(silent)
            silent.abort()

    def _answer_error(self, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The application must not answer as well.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        content = orjson.dumps(error_body(message, status))
        head = [
            (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"), *headers,
        ]  # fmt: skip
        events = (h11.Response(status_code=status, headers=head), h11.Data(data=content), h11.EndOfMessage())
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.close_gently()


class _Transport:
    """uvicorn's view of a transport: counts what is written and closes as it is told."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.written_bytes = 0
        self._transport = transport
        self._close = close
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written_bytes += len(data)
        self._transport.write(data)

    def close(self) -> None:
        self._closed = True
        self._close()

    def is_closing(self) -> bool:
        return self._closed or self._transport.is_closing()
