"""Who may talk to the gateway: names, web pages, media types, and what every answer carries."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support import gateway_server
from utils.compress.compressor import Compressor
from utils.errors import ConfigError
from utils.serving.app import PAGE_FILES
from utils.serving.door import DoorPolicy
from utils.serving.settings import is_loopback

PAGE = "http://localhost:3000"
KEY = "front door"
CLOSED_PORT = "http://127.0.0.1:9"
EVERY_ROUTE = [*PAGE_FILES, "/healthz", "/metrics", "/v1/models", "/v1/memories", "/v1/compression", "/openapi.json"]

Headers = dict[str, str]
Got = tuple[int, Headers, Any]


@pytest.fixture(scope="module")
def url(compressor: Compressor) -> Iterator[str]:
    with gateway_server.running(compressor, CLOSED_PORT) as address:
        yield address


@pytest.fixture(scope="module")
def shared_url(compressor: Compressor) -> Iterator[str]:
    with gateway_server.running(
        compressor,
        CLOSED_PORT,
        api_keys=(KEY,),
        allowed_origins=(PAGE, "https://app.example.org/"),
        allowed_hosts=("Gateway.Example.org", "*.lan"),
    ) as address:
        yield address


def ask(url: str, method: str, path: str, headers: Headers | None = None, body: bytes | None = None) -> Got:
    """The answer's status, its headers and its body; JSON is read."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        sent = {"Host": urlsplit(url).netloc, **(headers or {})}
        if body is not None:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content: Any = answer.read()
        if content and answer.headers.get_content_type() == "application/json":
            content = json.loads(content)
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content
    finally:
        connection.close()


@pytest.mark.parametrize("path", [*EVERY_ROUTE, "/v1/nothing"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "HEAD", "DELETE"])
def test_a_foreign_host_is_refused_everywhere(url: str, method: str, path: str) -> None:
    status, headers, said = ask(url, method, path, {"Host": "evil.example:8080"})
    assert status == 403
    if method != "HEAD":
        assert "--allowed-host" in said["error"]["message"]
        assert "evil.example" in said["error"]["message"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "localhost.:8080", "127.0.0.1", "127.9.8.7:65535", "[::1]", "[::1]:8080"]
)
def test_loopback_names_are_answered(url: str, host: str) -> None:
    assert ask(url, "GET", "/page.css", {"Host": host})[0] == 200


def test_messages_are_short_whatever_they_cite(gateway: httpx.Client) -> None:
    long = "x" * 5000
    answers = [
        gateway.get("/healthz", headers={"Host": long}),
        gateway.get("/healthz", headers={"Host": long[:250]}),
        gateway.post("/v1/memories", content=b"{}", headers={"Content-Type": long}),
        gateway.get("/v1/" + long),
    ]
    assert [got.status_code for got in answers] == [403, 403, 415, 404]
    assert max(len(got.json()["error"]["message"]) for got in answers) < 1000


@pytest.mark.parametrize(
    "host",
    ["", "evil", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil", "localhost:x", "localhost..",
     "[::2]", "[::1", "0.0.0.0", "10.0.0.1", "127.1", "2130706433", "localhost, evil", "localhost/", "lo calhost",
     "[::ffff:10.0.0.1]", "*", ".localhost", "evil.localhost"],
)  # fmt: skip
def test_all_other_names_are_not(url: str, host: str) -> None:
    assert ask(url, "GET", "/page.css", {"Host": host})[0] == 403


def test_further_names_can_be_allowed(shared_url: str) -> None:
    for host in ("gateway.example.org", "GATEWAY.example.org:8443", "a.lan", "a.b.lan.", "localhost"):
        assert ask(shared_url, "GET", "/page.css", {"Host": host})[0] == 200
    for host in ("example.org", "x.gateway.example.org", "lan", "alan"):
        assert ask(shared_url, "GET", "/page.css", {"Host": host})[0] == 403


def test_on_an_open_address_any_name_is_answered_unless_names_are_given(compressor: Compressor) -> None:
    with gateway_server.running(compressor, CLOSED_PORT, host="0.0.0.0", api_keys=(KEY,)) as url:
        assert ask(url, "GET", "/page.css", {"Host": "whatever.example"})[0] == 200
        assert ask(url, "GET", "/page.css", {"Host": "a b"})[0] == 403
    with gateway_server.running(compressor, CLOSED_PORT, host="0.0.0.0", allowed_hosts=("one.example",)) as url:
        assert ask(url, "GET", "/page.css", {"Host": "whatever.example"})[0] == 403
        assert ask(url, "GET", "/page.css", {"Host": "one.example"})[0] == 200
        assert ask(url, "GET", "/page.css", {"Host": "localhost"})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": PAGE},
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_web_pages_of_others_are_refused(url: str, method: str, headers: Headers) -> None:
    for path in ("/", "/v1/memories", "/healthz", "/nothing"):
        status, answered, said = ask(
            url, method, path, {**headers, "Content-Type": "application/json"}, b'{"text":"x"}'
        )
        assert status == 403
        assert "--allowed-origin" in said["error"]["message"]
        assert "access-control-allow-origin" not in answered
    assert ask(url, "GET", "/v1/memories")[2]["data"] == []


def test_the_gateways_own_page_and_programs_are_not(url: str) -> None:
    host = urlsplit(url).netloc
    for headers in (
        {},
        {"Origin": url},
        {"Origin": url.upper(), "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://localhost:81", "Host": "LocalHost:81"},
        {"Origin": "http://localhost", "Host": "localhost:80"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
    ):
        assert ask(url, "GET", "/v1/compression", headers)[0] == 200
    for headers in ({"Origin": f"https://{host}"}, {"Origin": "http://localhost"}, {"Origin": url + "/"}):
        assert ask(url, "GET", "/v1/compression", headers)[0] == 403


def test_a_link_elsewhere_opens_the_page_and_nothing_more(url: str) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert ask(url, "GET", "/", link)[0] == 200
    assert ask(url, "GET", "/v1/memories", link)[0] == 403
    assert ask(url, "POST", "/", {**link, "Content-Type": "application/json"}, b"{}")[0] == 403


def test_a_page_that_is_allowed_asks_first_and_reads_the_answer(shared_url: str) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-stainless-lang"}
    for origin in (PAGE, "https://app.example.org"):
        status, headers, _ = ask(shared_url, "OPTIONS", "/v1/chat/completions", {"Origin": origin, **wanted})
        assert status in (200, 204)
        assert headers["access-control-allow-origin"] == origin
        assert "POST" in headers["access-control-allow-methods"]
        for name in ("authorization", "content-type", "x-stainless-lang"):
            assert name in headers["access-control-allow-headers"].lower()
        assert "Origin" in headers["vary"]
    page = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}
    status, headers, _ = ask(
        shared_url, "POST", "/v1/memories", {**page, "Authorization": f"Bearer {KEY}"}, b'{"text":"a"}'
    )
    assert (status, headers["access-control-allow-origin"]) == (201, PAGE)
    # Its errors can be read, too; the key is still asked for.
    status, headers, _ = ask(shared_url, "POST", "/v1/memories", page, b'{"text":"a"}')
    assert (status, headers["access-control-allow-origin"]) == (401, PAGE)
    for origin in ("http://localhost:3001", "https://localhost:3000", "null", "http://app.example.org"):
        assert ask(shared_url, "OPTIONS", "/v1/chat/completions", {"Origin": origin, **wanted})[0] == 403
    assert "Origin" in ask(shared_url, "GET", "/page.css")[1]["vary"]


def test_the_pages_see_what_was_compressed(compressor: Compressor) -> None:
    fake_server = pytest.importorskip("tests.support.fake_server")
    with (
        fake_server.running() as backend,
        gateway_server.running(compressor, backend.url, allowed_origins=(PAGE,)) as url,
    ):
        body = b'{"model": "tiny", "messages": [{"role": "user", "content": "<|memory_start|>a = 1<|memory_end|>"}]}'
        headers = ask(url, "POST", "/v1/chat/completions", {"Origin": PAGE, "Content-Type": "application/json"}, body)[
            1
        ]
    told = headers["access-control-expose-headers"].lower()
    assert all(name in told for name in headers if name.startswith("x-code-llava-"))
    assert "x-code-llava-latents" in told


@pytest.mark.parametrize("value", ["*", "null", "localhost:3000", "http://a/b", "http://", "http://*.a", "http://a b"])
def test_an_origin_that_is_none_is_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origin"):
        DoorPolicy("127.0.0.1", (), (value,))


@pytest.mark.parametrize("value", ["*", "", "http://a", "a b", "a/b", "*.", "a.*"])
def test_a_host_that_is_none_is_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-host"):
        DoorPolicy("127.0.0.1", (value,), ())


def test_which_addresses_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "192.168.1.2", "gateway", "localhost.example.org", "1")))


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json",
             "text/plain; application/json", "application/json, text/plain", ""],
)  # fmt: skip
def test_bodies_must_be_json(url: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    for method, path in (("POST", "/v1/memories"), ("POST", "/v1/chat/completions"), ("DELETE", "/v1/memories/x")):
        status, _, said = ask(url, method, path, headers, b'{"text":"planted"}')
        assert status == 415
        assert "application/json" in said["error"]["message"]
    assert ask(url, "GET", "/v1/memories")[2]["data"] == []


def test_spellings_of_json_and_requests_without_a_body(url: str) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"):
        status, _, said = ask(url, "POST", "/v1/memories", {"Content-Type": kind}, b'{"text":"a"}')
        assert status == 201
        assert ask(url, "DELETE", f"/v1/memories/{said['id']}")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [("GET", "/v1/memories/", 404), ("GET", "/nothing", 404), ("GET", "/v1/nothing", 404), ("TRACE", "/", 405),
     ("DELETE", "/v1/memories", 405), ("GET", "/v1/chat/completions", 405), ("GET", "//evil.example/", 404),
     ("OPTIONS", "/", 405)],
)  # fmt: skip
def test_unknown_paths_and_methods_are_errors_and_never_redirects(
    url: str, method: str, path: str, wanted: int
) -> None:
    status, headers, said = ask(url, method, path)
    assert (status, said["error"]["code"]) == (wanted, wanted)
    assert method in said["error"]["message"]
    assert "location" not in headers


def test_every_answer_tells_browsers_what_not_to_do(url: str) -> None:
    for path in [*EVERY_ROUTE, "/nothing"]:
        headers = ask(url, "GET", path)[1]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
