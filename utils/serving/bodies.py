"""Bounds on request bodies: the length of each, the bytes of all together, and the time they take to arrive."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.serving.api_error import ApiError
from utils.serving.settings import ConnectionLimits, GatewaySettings

_CLOSE = {"Connection": "close"}
# The beginning of each body is not counted: long bodies, however many, never keep short requests out. The number of
# connections bounds what this adds up to.
_FREE_BYTES = 64 << 10


class BodyLimits:
    """Watches the bodies on their way to the application; reading one raises an `ApiError` where it breaks a bound.

    A body counts until its request is answered, since the answer is made from it.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._limits = settings.connections
        self._max_bytes = settings.max_body_bytes
        self._bytes_left = settings.max_bodies_bytes or 4 * settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            # Before a byte of it is read.
            await self._too_long().response()(scope, receive, send)
            return
        body = _Body(self._limits)

        async def watched_receive() -> Message:
            message = await body.next(receive)
            if message["type"] == "http.request":
                self._count(body, len(message.get("body", b"")))
            return message

        try:
            await self._app(scope, watched_receive, send)
        finally:
            self._bytes_left += body.counted_bytes

    def _count(self, body: _Body, num_bytes: int) -> None:
        body.num_bytes += num_bytes
        if body.num_bytes > self._max_bytes:
            raise self._too_long()
        more = max(body.num_bytes - _FREE_BYTES, 0) - body.counted_bytes
        if more > self._bytes_left:
            message = "too many long requests are in work: try again later"
            raise ApiError(503, message, headers={"Retry-After": "1", **_CLOSE})
        body.counted_bytes += more
        self._bytes_left -= more

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max_bytes} bytes", headers=_CLOSE)


class _Body:
    """One body as it arrives."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.num_bytes = 0
        self.counted_bytes = 0
        self._limits = limits
        self._began = asyncio.get_running_loop().time()
        self._complete = False

    async def next(self, receive: Receive) -> Message:
        """The next message; once the body is there, the rest is about the connection and may take its time."""
        if self._complete:
            return await receive()
        limits = self._limits
        until = self._began + limits.body_timeout_s + self.num_bytes / limits.body_bytes_per_s
        pause_ends = asyncio.get_running_loop().time() + limits.body_pause_s
        try:
            async with asyncio.timeout_at(min(until, pause_ends)):
                message = await receive()
        except TimeoutError:
            text = f"the body came too slowly: {self.num_bytes} bytes have arrived"
            raise ApiError(408, text, headers=_CLOSE) from None
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message
