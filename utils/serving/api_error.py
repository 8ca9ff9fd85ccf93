"""Errors in the shape that OpenAI clients read: `{"error": {"message", "type", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

_SHOWN_CHARACTERS = 60


class ApiError(Exception):
    """A request that the gateway answers with an error.

    Attributes:
        status: HTTP status.
        headers: Further headers, such as Retry-After.
    """

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer to the request."""
        body = orjson.dumps(error_body(str(self), self.status))
        return Response(body, self.status, self.headers, media_type="application/json")


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error object; `type` follows the status as OpenAI's does."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "code": status}}


def shown(value: Any) -> str:
    """A client's value as an error message cites it: of bounded length, whatever the value's size and depth."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value[: _SHOWN_CHARACTERS + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
