"""The vLLM server behind the gateway: requests go out with its own key, answers come back byte for byte.

Of an answer's head only the status, the media type and Retry-After go on to the client. Failures of the connection
become `ApiError`s, or, inside a stream that has begun, a last `error` event. Nothing is tried again: that is the
client's to decide.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx
import orjson

from utils.client.connection import NO_KEY, api_base, find_api_key
from utils.serving.api_error import ApiError, error_body
from utils.serving.backend import EVENT_STREAM, Answer
from utils.serving.settings import GatewaySettings

if TYPE_CHECKING:
    from utils.serving.rewriter import CompressedRequest

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
# What an API answers. Anything else, such as a page of HTML, a browser should not show as this gateway's.
_MEDIA_TYPE = re.compile(
    rf"(application/json|{EVENT_STREAM}|text/plain)( *; *charset *= *\"?[\w.-]+\"?)?", re.ASCII | re.IGNORECASE
)
_RETRY_AFTER = re.compile(r"[0-9]{1,9}|[A-Za-z]{3}, [0-9A-Za-z: -]{1,40}")


class Upstream:
    """One backend; see `Backend`.

    Args:
        settings: Its address, key and limits.
    """

    is_local = False

    def __init__(self, settings: GatewaySettings) -> None:
        self.base_url = api_base(settings.backend_url)
        self._max_answer_bytes = settings.max_answer_bytes
        found = find_api_key(settings.backend_key)
        # Requests are as many as the gateway lets in: its own limits bound them, not the connection pool.
        self._http = httpx.AsyncClient(
            # Compressed answers could grow without bound here.
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
            | ({} if found == NO_KEY else {"Authorization": f"Bearer {found}"}),
            timeout=httpx.Timeout(settings.timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # A redirect would carry prompts and the key to wherever it says.
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def models(self) -> Answer:
        """The server's own list.

        Raises:
            ApiError: 502 or 504, there is none.
        """
        return await self._whole(await self._send(self._http.build_request("GET", self.base_url + "/models")))

    async def ask(self, request: CompressedRequest) -> Answer:
        """Send a request's body.

        Raises:
            ApiError: 502 or 504, there is no answer, it broke off or is too long.
        """
        url = self.base_url + request.path
        response = await self._send(self._http.build_request("POST", url, content=request.content))
        kind = _media_type(response)
        if not kind.startswith(EVENT_STREAM):
            return await self._whole(response)
        return Answer(content=self._pieces(response), status=response.status_code, media_type=kind)

    async def _whole(self, response: httpx.Response) -> Answer:
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
        wait = response.headers.get("retry-after", "")
        return Answer(
            content=bytes(content),
            status=response.status_code,
            media_type=_media_type(response),
            headers={"Retry-After": wait} if _RETRY_AFTER.fullmatch(wait) else {},
        )

    async def _pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """An answer as it arrives; closing the connection ends the server's work."""
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


def _media_type(answer: httpx.Response) -> str:
    """The media type under which an answer goes on."""
    given = answer.headers.get("content-type", "application/json").strip()
    return given.lower() if _MEDIA_TYPE.fullmatch(given) else "application/octet-stream"
