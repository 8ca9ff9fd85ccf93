"""The vLLM server behind the gateway: requests go out with its own key, answers come back byte for byte.

Of an answer's head only the status, the media type and Retry-After go on to the client. Failures of the connection
become `ApiError`s, or, inside a stream that has begun, a last `error` event.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from utils.client.connection import NO_KEY, api_base, find_api_key
from utils.serving.api_error import ApiError, error_body

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
# What an API answers. Anything else, such as a page of HTML, a browser should not show as this gateway's.
_MEDIA_TYPE = re.compile(
    r"(application/json|text/event-stream|text/plain)( *; *charset *= *\"?[\w.-]+\"?)?", re.ASCII | re.IGNORECASE
)
_RETRY_AFTER = re.compile(r"[0-9]{1,9}|[A-Za-z]{3}, [0-9A-Za-z: -]{1,40}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status_code: int
    media_type: str
    content: bytes


class Upstream:
    """One backend.

    Args:
        url: Its address, with or without `/v1`.
        key: Its key; None looks into the environment.
        timeout_s: Its longest silence.
        transport: Takes the network's place, see `local_backend.py`.
        max_answer_bytes: Longest answer that is not streamed.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        max_answer_bytes: int = 256 << 20,
    ) -> None:
        self.base_url = api_base(url)
        self._max_answer_bytes = max_answer_bytes
        found = find_api_key(key)
        # Requests are as many as the gateway lets in: its own limits bound them, not the connection pool.
        self._http = httpx.AsyncClient(
            # Compressed answers could grow without bound here.
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
            | ({} if found == NO_KEY else {"Authorization": f"Bearer {found}"}),
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            transport=transport,
            # A redirect would carry prompts and the key to wherever it says.
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def get(self, path: str) -> Answer:
        """A small answer.

        Raises:
            ApiError: 502 or 504, there is none.
        """
        response = await self._send(self._http.build_request("GET", self.base_url + path))
        return Answer(response.status_code, media_type(response), await self.whole(response))

    async def post(self, path: str, body: bytes) -> httpx.Response:
        """Send a request; the answer's body is still to be read, with `whole` or `pieces`.

        Raises:
            ApiError: 502 or 504, there is no answer.
        """
        return await self._send(self._http.build_request("POST", self.base_url + path, content=body))

    async def whole(self, response: httpx.Response) -> bytes:
        """Read an answer to its end.

        Raises:
            ApiError: 502 or 504, it broke off or is too long.
        """
        content = bytearray()
        try:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > self._max_answer_bytes:
                    raise ApiError(502, f"the backend's answer is longer than {self._max_answer_bytes} bytes")
        except httpx.HTTPError as error:
            raise self._failure(error) from None
        finally:
            await response.aclose()
        return bytes(content)

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

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._failure(error) from None
        if response.status_code != 200 and not 400 <= response.status_code < 600:
            await response.aclose()
            raise ApiError(502, f"the backend answered {response.status_code}: expected 200 or an error")
        return response

    def _failure(self, error: httpx.HTTPError) -> ApiError:
        # The address may be private: it goes to the log, not to the client.
        logger.warning("backend %s: %s %s", self.base_url, type(error).__name__, error)
        if isinstance(error, httpx.TimeoutException):
            return ApiError(504, "the backend did not answer in time")
        return ApiError(502, "the backend cannot be reached or dropped the connection")


def media_type(answer: httpx.Response) -> str:
    """The media type under which an answer goes on."""
    given = answer.headers.get("content-type", "application/json").strip()
    return given.lower() if _MEDIA_TYPE.fullmatch(given) else "application/octet-stream"


def retry_after(answer: httpx.Response) -> dict[str, str]:
    """The header that says when to come back, if there is one."""
    given = answer.headers.get("retry-after", "")
    return {"Retry-After": given} if _RETRY_AFTER.fullmatch(given) else {}


def json_object(content: bytes) -> dict[str, Any]:
    """Read an answer to which something is to be added.

    Raises:
        ApiError: 502, it is no JSON object.
    """
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ApiError(502, "the backend's answer is no JSON object")
    return value
