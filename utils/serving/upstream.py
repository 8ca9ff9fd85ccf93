"""The vLLM server behind the gateway: requests go out with its own key, answers come back byte for byte.

Failures of the connection become `ApiError`s, or, inside a stream that has begun, a last `error` event.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import httpx
import orjson

from utils.inference.server_connection import NO_KEY, api_base, find_api_key
from utils.serving.api_error import ApiError, error_body

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0


class Upstream:
    """One backend.

    Args:
        url: Its address, with or without `/v1`.
        key: Its key; None looks into the environment.
        timeout_s: Its longest silence.
        transport: Takes the network's place, see `local_backend.py`.
    """

    def __init__(
        self, url: str, key: str | None, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.base_url = api_base(url)
        found = find_api_key(key)
        # Requests are as many as the gateway lets in: its own limits bound them, not the connection pool.
        self._http = httpx.AsyncClient(
            headers={"Content-Type": "application/json"}
            | ({} if found == NO_KEY else {"Authorization": f"Bearer {found}"}),
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            transport=transport,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def get(self, path: str) -> httpx.Response:
        """A small answer.

        Raises:
            ApiError: 502 or 504, there is none.
        """
        try:
            return await self._http.get(self.base_url + path)
        except httpx.HTTPError as error:
            raise self._failure(error) from None

    async def post(self, path: str, body: bytes) -> httpx.Response:
        """Send a request; the answer's body is still to be read, with `whole` or `pieces`.

        Raises:
            ApiError: 502 or 504, there is no answer.
        """
        try:
            return await self._http.send(
                self._http.build_request("POST", self.base_url + path, content=body), stream=True
            )
        except httpx.HTTPError as error:
            raise self._failure(error) from None

    async def whole(self, response: httpx.Response) -> bytes:
        """Read an answer to its end.

        Raises:
            ApiError: 502 or 504, it broke off.
        """
        try:
            return await response.aread()
        except httpx.HTTPError as error:
            raise self._failure(error) from None
        finally:
            await response.aclose()

    async def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """An answer as it arrives. Leaving the loop early closes the connection, which ends the backend's work."""
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except httpx.HTTPError as error:
            failure = self._failure(error)
            logger.warning("%s in the middle of a stream", failure)
            yield b"data: " + orjson.dumps(error_body(str(failure), failure.status)) + b"\n\n"
        finally:
            await response.aclose()

    def _failure(self, error: httpx.HTTPError) -> ApiError:
        # The address may be private: it goes to the log, not to the client.
        logger.warning("backend %s: %s %s", self.base_url, type(error).__name__, error)
        if isinstance(error, httpx.TimeoutException):
            return ApiError(504, "the backend did not answer in time")
        return ApiError(502, "the backend cannot be reached or dropped the connection")
