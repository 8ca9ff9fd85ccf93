"""What a backend may send: bounded answers, known media types, no redirects, no headers of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import fake_server, gateway_server
from tests.support.fake_server import FakeServer, Handler, refuse
from utils.compress.compressor import Compressor

COMPLETIONS = "/v1/completions"
PLAIN = {"model": "tiny", "prompt": "a"}
MARKED = {"model": "tiny", "prompt": "a <|memory_start|>b<|memory_end|>"}
MAX_ANSWER_BYTES = 100_000


@pytest.fixture(scope="module")
def backend() -> Iterator[FakeServer]:
    with fake_server.running() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(compressor: Compressor, backend: FakeServer) -> Iterator[httpx.Client]:
    with (
        gateway_server.running(compressor, backend.url, max_answer_bytes=MAX_ANSWER_BYTES) as url,
        httpx.Client(base_url=url, timeout=20) as client,
    ):
        yield client


def endless(handler: Handler) -> None:
    """An answer without an end, until the other side has enough."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(b" " * 10_000)
    except OSError:
        handler.server.requests.append(("ended", {}))


@pytest.mark.parametrize("body", [PLAIN, MARKED])
def test_an_answer_that_is_too_long_or_never_ends(
    gateway: httpx.Client, backend: FakeServer, body: dict[str, Any]
) -> None:
    backend.script = [endless, refuse(200, {"text": "x" * MAX_ANSWER_BYTES}), refuse(200, {"text": "x" * 1000})]
    said = [gateway.post(COMPLETIONS, json=body) for _ in range(3)]
    assert [answer.status_code for answer in said] == [502, 502, 200]
    assert str(MAX_ANSWER_BYTES) in said[0].json()["error"]["message"]
    assert ("ended", {}) in backend.requests


def test_a_list_of_models_that_never_ends(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.models_action = endless
    assert gateway.get("/v1/models").status_code == 502
    assert gateway.get("/healthz").status_code == 503
    backend.models_action = None


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 308, 600, 999])
def test_redirects_and_odd_statuses_are_a_backends_failure(
    gateway: httpx.Client, backend: FakeServer, status: int
) -> None:
    num_requests = len(backend.requests)
    backend.script = [refuse(status, b"", Location=backend.url + COMPLETIONS)]
    said = gateway.post(COMPLETIONS, json=PLAIN)
    assert (said.status_code, len(backend.requests)) == (502, num_requests + 1)
    assert str(status) in said.json()["error"]["message"]
    assert "location" not in said.headers


@pytest.mark.parametrize("content", [b"no JSON", b"[]", b"null", b"", b"\xff"])
def test_an_answer_that_is_no_object_cannot_be_added_to(
    gateway: httpx.Client, backend: FakeServer, content: bytes
) -> None:
    backend.script = [refuse(200, content)]
    assert gateway.post(COMPLETIONS, json=MARKED).status_code == 502


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("application/json", "application/json"),
        ("Application/JSON; charset=UTF-8", "application/json; charset=utf-8"),
        ("text/html", "application/octet-stream"),
        ("text/html; application/json", "application/octet-stream"),
        ("image/svg+xml", "application/octet-stream"),
        ("application/json; x=\xe9\xff", "application/octet-stream"),
    ],
)
def test_pages_of_a_backend_are_not_shown_as_ours(
    gateway: httpx.Client, backend: FakeServer, given: str, wanted: str
) -> None:
    odd = {
        "Content-Type": given,
        "Set-Cookie": "a=b",
        "Access-Control-Allow-Origin": "*",
        "X-Frame-Options": "ALLOWALL",
    }
    for status in (200, 400):
        backend.script = [refuse(status, b"{}", **odd)]
        said = gateway.post(COMPLETIONS, json=PLAIN)
        assert (said.status_code, said.headers["content-type"], said.content) == (status, wanted, b"{}")
        assert said.headers["x-frame-options"] == "DENY"
        assert not {"set-cookie", "access-control-allow-origin"} & set(said.headers)
    backend.models_action = refuse(200, b"{}", **odd)
    assert gateway.get("/v1/models").headers["content-type"] == wanted
    backend.models_action = None


@pytest.mark.parametrize(
    ("given", "passes"),
    [("7", True), ("Wed, 21 Oct 2026 07:28:00 GMT", True), ("\u00e9", False), ("7; a=b", False), ("9" * 100, False)],
)
def test_when_to_come_back(gateway: httpx.Client, backend: FakeServer, given: str, passes: bool) -> None:
    backend.script = [refuse(429, {"error": {"message": "busy"}}, **{"Retry-After": given})]
    said = gateway.post(COMPLETIONS, json=PLAIN)
    assert said.status_code == 429
    assert said.headers.get("retry-after") == (given if passes else None)


def test_a_stream_may_be_longer_than_a_whole_answer(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [fake_server.stream(*["x" * 1000] * 200)]
    said = gateway.post(COMPLETIONS, json={**PLAIN, "stream": True})
    assert len(said.content) > 2 * MAX_ANSWER_BYTES
    assert json.loads(said.text.split("\n\n")[0].removeprefix("data: "))["choices"][0]["text"] == "x" * 1000
