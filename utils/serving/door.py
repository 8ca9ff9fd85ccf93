"""Who may talk to the gateway: the names it answers to, the web pages that may use it, and the media type of bodies.

A browser lets every web page send requests to this machine. Three checks keep those out:

- `Host`: a page whose name was pointed at 127.0.0.1 (DNS rebinding) asks for that name.
- `Origin` and `Sec-Fetch-Site`: the browser itself says which page a request comes from.
- `Content-Type`: a form or script of another page can send text/plain without asking, but not application/json.

They hold for every path and method and come before the API key. This file knows nothing of what is served.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.errors import ConfigError
from utils.serving.api_error import ApiError, shown
from utils.serving.settings import is_loopback

# On every answer. Nothing from elsewhere, nothing inline: a text that is shown can never become a script.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_METHODS = "GET, POST, DELETE"
_REQUEST_HEADERS = "Authorization, Content-Type"
_PREFLIGHT_AGE_S = "600"
_LONGEST_NAME = 253  # of a host, by RFC 1035
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^\s/?#@\\]+)")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(?:\s*,\s*[A-Za-z0-9-]+)*")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class DoorPolicy:
    """Decides about requests by their headers.

    Args:
        host: Address that the gateway listens on. On a loopback address only loopback names and `allowed_hosts` are
            answered; on any other every name is, unless `allowed_hosts` is given.
        allowed_hosts: Further names, without a port; `*.example.org` is every name below it.
        allowed_origins: Origins such as `http://localhost:3000` whose pages may use the gateway.

    Raises:
        ConfigError: A name or an origin that is none.
    """

    def __init__(self, host: str, allowed_hosts: Iterable[str] = (), allowed_origins: Iterable[str] = ()) -> None:
        self._hosts = frozenset(_allowed_host(text) for text in allowed_hosts)
        self.origins = frozenset(_allowed_origin(text) for text in allowed_origins)
        self._any_host = not (self._hosts or is_loopback(host))

    def check(self, scope: Scope, headers: Headers) -> None:
        """Let a request pass.

        Raises:
            ApiError: 403 or 415, it may not.
        """
        self._check_host(headers)
        self._check_origin(scope, headers)
        _check_media_type(scope, headers)

    def asks_as(self, headers: Headers) -> str | None:
        """The allowed origin that a request comes from, as it was sent."""
        origin = headers.get("origin")
        return origin if origin is not None and _origin(origin) in self.origins else None

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            raise ApiError(403, "expected one Host header with a name that --allowed-host or a loopback address allows")
        # Of a.b.example.org: *.b.example.org, *.example.org, *.org.
        above = {f"*.{name.split('.', count)[-1]}" for count in range(1, name.count(".") + 1)}
        if not (self._any_host or is_loopback(name) or name in self._hosts or above & self._hosts):
            raise ApiError(
                403, f"this gateway does not answer to the name {name}: start it with --allowed-host {name} to allow it"
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origins = headers.getlist("origin")
        if len(origins) == 1 and self.asks_as(headers):
            return
        own = _origin(f"{scope['scheme']}://{headers['host']}")
        foreign = bool(origins) and (len(origins) > 1 or _origin(origins[0]) != own)
        sites = {site.strip().lower() for site in headers.getlist("sec-fetch-site")}
        if not foreign and (sites <= {"same-origin", "none"} or _follows_link(scope, headers)):
            return
        raise ApiError(403, "web pages of other sites may not use this gateway: --allowed-origin URL allows one")


class Door:
    """Asks the policy about every request, answers CORS preflights and sets the headers that all answers have."""

    def __init__(self, app: ASGIApp, policy: DoorPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; plain ASGI, so that streams and disconnects pass untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin: str | None = None

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message), origin)
            await send(message)

        try:
            self._policy.check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        origin = self._policy.asks_as(headers)
        if origin and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            # It comes before the request whose leave it asks for, and carries no key.
            await Response(status_code=204, headers=_preflight(headers))(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _add_headers(self, headers: MutableHeaders, origin: str | None) -> None:
        for name, value in SECURITY_HEADERS.items():
            headers[name] = value
        if self._policy.origins:
            # Caches must not give one page's answer to another.
            headers.add_vary_header("Origin")
        if origin:
            headers["Access-Control-Allow-Origin"] = origin
            told = [name for name in headers if name.startswith("x-code-llava-") or name == "retry-after"]
            if told:
                headers["Access-Control-Expose-Headers"] = ", ".join(told)


def _check_media_type(scope: Scope, headers: Headers) -> None:
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if not has_body and scope["method"] != "POST":
        return
    kinds = [value.partition(";")[0].strip().lower() for value in headers.getlist("content-type")]
    if kinds != ["application/json"]:
        raise ApiError(
            415, f"expected Content-Type: application/json, got {shown(', '.join(kinds)) if kinds else 'none'}"
        )


def _follows_link(scope: Scope, headers: Headers) -> bool:
    """Whether a person opens the gateway's page by a link elsewhere: nothing of it is told to the other site."""
    wanted = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    to_page = scope["method"] == "GET" and scope["path"] == "/"
    return to_page and all(headers.get(name) == value for name, value in wanted.items())


def _preflight(headers: Headers) -> dict[str, str]:
    wanted = headers.get("access-control-request-headers", "")
    # The origin is trusted by name; clients such as openai's for browsers send headers of their own.
    more = f", {wanted}" if _HEADER_NAMES.fullmatch(wanted) else ""
    answer = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": _REQUEST_HEADERS + more,
        "Access-Control-Max-Age": _PREFLIGHT_AGE_S,
    }
    if headers.get("access-control-request-private-network") == "true":
        answer["Access-Control-Allow-Private-Network"] = "true"
    return answer


def _host_name(text: str) -> str | None:
    """The name of a Host header in one spelling, without its port; None for what is no host."""
    match = _HOST.fullmatch(text.lower())
    if match is None:
        return None
    address, name, _ = match.groups()
    if name is not None:
        return str(name) if len(name) <= _LONGEST_NAME else None
    try:
        return f"[{ipaddress.IPv6Address(address)}]"
    except ValueError:
        return None


def _origin(text: str) -> str | None:
    """An origin in one spelling; None for what is none, such as `null`."""
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        return None
    scheme, host = match.groups()
    if scheme not in _DEFAULT_PORTS:
        return f"{scheme}://{host}"  # an app's own, such as vscode-webview://…
    name = _host_name(host)
    if name is None:
        return None
    port = host.rpartition(":")[2] if re.search(r":[0-9]+$", host) else _DEFAULT_PORTS[scheme]
    return f"{scheme}://{name}:{port}"


def _allowed_host(text: str) -> str:
    below = text.startswith("*.")
    name = _host_name(text.removeprefix("*.")) or _host_name(f"[{text}]")
    if name is None:
        raise ConfigError(f"--allowed-host: expected a name such as gateway.example.org, got {text!r}")
    return f"*.{name}" if below else name


def _allowed_origin(text: str) -> str:
    origin = _origin(text.removesuffix("/"))
    if origin is None or "*" in origin:
        raise ConfigError(
            f"--allowed-origin: expected a web page's origin such as http://localhost:3000, got {text!r} "
            "(there is no * for all pages: name each)"
        )
    return origin
