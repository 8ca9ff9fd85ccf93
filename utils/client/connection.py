"""Where an OpenAI-compatible server is, which key opens it, and what its failures mean.

The rules have this one home; `server_client.py` and every other program that talks to a server use them. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from utils.errors import ConfigError, ServerError

KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
# The openai package insists on a key; a server without one ignores it.
NO_KEY = "EMPTY"

_ENDPOINTS = ("/chat/completions", "/completions", "/models")
_TRANSIENT_STATUS = (408, 409, 425, 429)


class RequestError(ServerError):
    """One request failed.

    Attributes:
        status: HTTP status; None when there was no whole answer.
        transient: Another try may work: 408, 409, 425, 429, 5xx, or the connection was lost.
        unreachable: Nothing listens at the address.
        retry_after_s: The wait that the server asked for.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        transient: bool = False,
        unreachable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient
        self.unreachable = unreachable
        self.retry_after_s = retry_after_s


def api_base(server_url: str) -> str:
    """The address that ends in `/v1`, from any usual spelling: without scheme, with or without `/v1`, with an endpoint.

    Raises:
        ConfigError: It is no http address.
    """
    text = server_url.strip()
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"server URL {server_url!r} is not usable, expected for example http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/")
    for endpoint in _ENDPOINTS:
        path = path.removesuffix(endpoint)
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix('/v1')}/v1"


def find_api_key(flag: str | None = None) -> str:
    """The key of the flag, else of `VLLM_API_KEY`, else of `OPENAI_API_KEY`, else a placeholder."""
    candidates = (flag, *(os.environ.get(name) for name in KEY_VARIABLES))
    return next((key for key in candidates if key), NO_KEY)


@contextlib.contextmanager
def request_errors(where: str, timeout_s: float) -> Iterator[None]:
    """Turn the openai package's exceptions into `RequestError`s that say what the server said.

    Args:
        where: The address, for the message.
        timeout_s: The limit that a timeout ran into.
    """
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        status = error.status_code
        message = f"{where} answered {status}: {_server_message(error.response.text)}"
        if status in (401, 403):
            message += f" (the key comes from --api-key, {' or '.join(KEY_VARIABLES)})"
        raise RequestError(
            message,
            status=status,
            transient=status in _TRANSIENT_STATUS or status >= 500,
            retry_after_s=_seconds(error.response.headers.get("retry-after")),
        ) from None
    except (openai.APITimeoutError, TimeoutError):
        raise RequestError(f"{where} did not answer within {timeout_s:g} s: raise --timeout") from None
    except openai.APIConnectionError as error:
        raise _connection_lost(where, error.__cause__ or error) from None
    except openai.APIError as error:  # an error object inside a stream
        raise RequestError(f"{where} broke the answer off: {_server_message(error.message)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{where} sent what is no JSON: {error}") from None
    except Exception as error:
        # The transport is httpx in some releases of openai and httpx2 in others; while a stream is read its errors
        # come unwrapped, so they are known by the package's name.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        if "Timeout" in type(error).__name__:
            raise RequestError(f"{where} went silent for {timeout_s:g} s: raise --timeout") from None
        raise _connection_lost(where, error) from None


def _connection_lost(where: str, cause: BaseException) -> RequestError:
    unreachable = type(cause).__name__ == "ConnectError"
    what = "cannot be reached" if unreachable else "dropped the connection"
    return RequestError(f"{where} {what}: {cause or type(cause).__name__}", transient=True, unreachable=unreachable)


def _server_message(text: str) -> str:
    """The message inside an error body in the shapes that servers use, else the body."""
    try:
        body: Any = json.loads(text)
    except ValueError:
        return text.strip() or "(no message)"
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and name in body:
            body = body[name]
    return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)


def _seconds(retry_after: str | None) -> float | None:
    """The delay form of Retry-After; its date form is left to the back-off."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
