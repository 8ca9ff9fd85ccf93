"""Keys at the entrance, and the count of who came: whose each request is, before its body is read."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.serving.api_error import ApiError
from utils.serving.metrics import Metrics
from utils.serving.settings import owner_of

# Address → file in `page/`, media type: served to everyone; what they ask the API for needs the API's key.
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_OPEN_PATHS = ("/healthz", *PAGE_FILES)


class Admission:
    """Checks the key, counts requests and answers; plain ASGI, so that streams and disconnects pass untouched.

    Routes find under `request.state.owner` whose request it is; "" where there are no keys.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._owners = [owner_of(key.encode()) for key in api_keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        with self._metrics.active.track_inprogress():
            owner = self._owner(scope)
            if owner is not None:
                scope.setdefault("state", {})["owner"] = owner
                await self._app(scope, receive, counting_send)
            else:
                error = ApiError(401, "wrong or missing API key", headers={"WWW-Authenticate": "Bearer"})
                await error.response()(scope, receive, counting_send)

    def _owner(self, scope: Scope) -> str | None:
        """Whose request this is; None for one that may not enter."""
        if not self._owners or scope["path"] in _OPEN_PATHS:
            return ""
        given = owner_of(dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer "))
        # Constant time: the answer's delay must tell neither how much of a guess is right nor whose key it is.
        matches = [owner for owner in self._owners if hmac.compare_digest(given, owner)]
        return matches[0] if matches else None
