"""Connections that misbehave: half requests, slow bodies, readers that stop, more clients than places."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette")

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse

from tests.support import gateway_server
from tests.support.processes import free_port, start_python, wait_until
from utils.serving.api_error import ApiError
from utils.serving.bodies import BodyLimits
from utils.serving.settings import ConnectionLimits, GatewaySettings

QUICK = ConnectionLimits(
    header_timeout_s=0.4,
    keep_alive_s=0.4,
    body_pause_s=0.4,
    body_timeout_s=0.8,
    write_timeout_s=0.5,
    linger_s=0.5,
    shutdown_s=1,
    max_connections=8,
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
MAX_BODY_BYTES = 300_000


def post(length: int | str, path: str = "/") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


class Application:
    """Reads the body and tells its length; `/endless` streams until the client goes, `/slow` waits for `goes_on`."""

    def __init__(self) -> None:
        self.streaming = 0
        self.goes_on = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        # As the gateway's own routes do.
        request = Request(scope, receive)
        try:
            if scope["path"] == "/endless":
                response: Any = StreamingResponse(self._endless())
            elif scope["path"] == "/unread":
                response = JSONResponse("not read", 401)
            else:
                body = await request.body()
                while scope["path"] == "/slow" and not self.goes_on.is_set() and not await request.is_disconnected():
                    await asyncio.sleep(0.01)
                response = JSONResponse(len(body))
        except ClientDisconnect:
            return
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _endless(self) -> Any:
        self.streaming += 1
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)
        finally:
            self.streaming -= 1


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def address(application: Application) -> Iterator[tuple[str, int]]:
    settings = GatewaySettings(
        backend_url="", connections=QUICK, max_body_bytes=MAX_BODY_BYTES, max_bodies_bytes=2 * MAX_BODY_BYTES
    )
    with gateway_server.serving(BodyLimits(application, settings), QUICK) as url:
        yield "127.0.0.1", int(urlsplit(url).port or 0)
        application.goes_on.set()


@contextlib.contextmanager
def connected(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=10) as client:
        yield client


def until_closed(client: socket.socket) -> bytes:
    """Everything that comes until the other side closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while piece := client.recv(65536):
            got += piece
    return got


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d+)", answer)
    assert found, answer[:200]
    return int(found[1])


def next_status(client: socket.socket) -> int:
    """Read one whole answer."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    answer.read()
    return answer.status


def ask(address: tuple[str, int]) -> int:
    with connected(address) as client:
        client.sendall(GET)
        return next_status(client)


@pytest.mark.parametrize(
    "sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nHost: localhost\r\n"]
)
def test_half_headers_are_closed_in_time(address: tuple[str, int], sent: bytes) -> None:
    with connected(address) as client:
        client.sendall(sent)
        began = time.monotonic()
        assert until_closed(client) == b""
        assert 0.3 < time.monotonic() - began < 2


def test_dripping_headers_are_closed_in_time(address: tuple[str, int]) -> None:
    with connected(address) as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # reset or broken pipe, as the kernel likes
            for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        assert until_closed(client) == b""
        assert time.monotonic() - began < 2


def test_idle_connections_are_closed_in_time_and_busy_ones_stay(address: tuple[str, int]) -> None:
    with connected(address) as client:
        began = time.monotonic()
        for _ in range(5):
            client.sendall(GET)
            assert next_status(client) == 200
            time.sleep(0.2)
        assert time.monotonic() - began > 2 * QUICK.keep_alive_s
        client.sendall(GET[:5])  # a next request that never gets whole
        assert until_closed(client) == b""
        assert time.monotonic() - began < 4


def test_a_body_that_stops_is_answered_and_closed(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(post(1000) + b"x" * 10)
        answer = until_closed(client)
    assert status_of(answer) == 408
    assert b'"error"' in answer
    assert b"connection: close" in answer.lower()


def test_a_body_that_drips_is_answered_and_closed(address: tuple[str, int]) -> None:
    began = time.monotonic()
    with connected(address) as client:
        client.sendall(post(1000))
        with contextlib.suppress(OSError):
            for _ in range(40):
                client.sendall(b"x")
                time.sleep(0.1)
                if time.monotonic() - began > 1.2:
                    break
        assert status_of(until_closed(client)) == 408
    assert time.monotonic() - began < 3


def test_a_long_body_may_take_its_time_while_it_comes(address: tuple[str, int]) -> None:
    piece = b"x" * 60_000  # 5 of them: far above the slowest rate, but for longer than a short body has
    with connected(address) as client:
        client.sendall(post(5 * len(piece)))
        for _ in range(5):
            time.sleep(0.25)
            client.sendall(piece)
        assert next_status(client) == 200


def test_a_declared_length_over_the_limit_is_refused_at_once(address: tuple[str, int]) -> None:
    for length in (MAX_BODY_BYTES + 1, 10**15):
        with connected(address) as client:
            began = time.monotonic()
            client.sendall(post(length))
            answer = until_closed(client)
            assert time.monotonic() - began < 0.3
        assert status_of(answer) == 413
        assert str(MAX_BODY_BYTES).encode() in answer


def test_a_client_that_sends_on_can_read_why_it_is_refused(address: tuple[str, int]) -> None:
    with connected(address) as client:
        with contextlib.suppress(OSError):
            client.sendall(post(10 * MAX_BODY_BYTES) + b"x" * (2 * MAX_BODY_BYTES))
        assert status_of(until_closed(client)) == 413


def test_chunks_are_counted_as_they_come(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(5):
                client.sendall(b"%x\r\n" % 100_000 + b"x" * 100_000 + b"\r\n")
        assert status_of(until_closed(client)) == 413


def test_the_rest_of_a_body_that_nobody_reads_is_waited_for_briefly(address: tuple[str, int]) -> None:
    with connected(address) as client:
        client.sendall(post(1000, "/unread"))
        began = time.monotonic()
        answer = until_closed(client)
        assert status_of(answer) == 401
        assert time.monotonic() - began < 2
    with connected(address) as client:  # one that comes leaves the connection usable
        client.sendall(post(1000, "/unread"))
        assert next_status(client) == 401
        client.sendall(b"x" * 1000 + GET)
        assert next_status(client) == 200


def test_all_bodies_together_are_bounded_and_given_back(address: tuple[str, int], application: Application) -> None:
    big = b"x" * MAX_BODY_BYTES
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(address)) for _ in range(2)]
        for client in held:
            client.sendall(post(len(big), "/slow") + big)
        time.sleep(0.3)
        with connected(address) as client:
            client.sendall(post(len(big)) + big)
            answer = until_closed(client)
            assert status_of(answer) == 503
            assert b"retry-after" in answer.lower()
        assert ask(address) == 200  # short requests go on
        application.goes_on.set()
        assert [next_status(client) for client in held] == [200, 200]
    for _ in range(3):  # as much as before: nothing stays counted
        with connected(address) as client:
            client.sendall(post(len(big)) + big)
            assert next_status(client) == 200
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # bodies whose clients go away, or stop
            stack.enter_context(connected(address)).sendall(post(len(big)) + big[:-1])
        time.sleep(1)
        with connected(address) as client:
            client.sendall(post(len(big)) + big)
            assert next_status(client) == 200


def test_a_client_that_stops_reading_ends_the_work(address: tuple[str, int], application: Application) -> None:
    with connected(address) as client:
        client.sendall(GET.replace(b"/ ", b"/endless "))
        head_and_more = b""
        while not head_and_more.endswith(b"x" * 100):
            head_and_more += client.recv(1000)
        time.sleep(1)  # the kernel's buffers fill, then half a second passes
        deadline = time.monotonic() + 5
        while application.streaming and time.monotonic() < deadline:
            time.sleep(0.05)
        assert application.streaming == 0


def test_a_client_that_reads_slowly_is_not_cut(address: tuple[str, int], application: Application) -> None:
    with connected(address) as client:
        client.sendall(GET.replace(b"/ ", b"/endless "))
        until = time.monotonic() + 4 * QUICK.write_timeout_s
        while time.monotonic() < until:
            assert len(client.recv(1 << 20)) > 0
            time.sleep(0.05)
        assert application.streaming == 1


def test_when_all_places_are_taken_the_most_silent_one_goes(address: tuple[str, int], application: Application) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(address)) for _ in range(QUICK.max_connections)]
        silent[0].sendall(post(10, "/slow") + b"x" * 10)  # in work: stays
        silent[1].sendall(post(10) + b"x")  # half a body: goes
        time.sleep(0.1)
        began = time.monotonic()
        assert [ask(address) for _ in range(20)] == [200] * 20
        assert time.monotonic() - began < 1
        application.goes_on.set()
        assert next_status(silent[0]) == 200


def test_when_all_places_are_in_work_a_client_is_told_to_come_back(
    address: tuple[str, int], application: Application
) -> None:
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connected(address)) for _ in range(QUICK.max_connections)]
        for client in busy:
            client.sendall(post(1, "/slow") + b"x")
        time.sleep(0.1)
        for _ in range(5):
            with connected(address) as client:
                client.sendall(GET)
                answer = until_closed(client)
                assert status_of(answer) == 503
                assert b"retry-after" in answer.lower()
        application.goes_on.set()
        assert [next_status(client) for client in busy] == [200] * len(busy)
    assert ask(address) == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nbroken\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000, 431),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nnot a length\r\n", 400),
    ],
)
def test_what_is_no_http_is_an_error_in_the_usual_shape(address: tuple[str, int], head: bytes, status: int) -> None:
    with connected(address) as client:
        with contextlib.suppress(OSError):
            client.sendall(head)
        answer = until_closed(client)
    assert status_of(answer) == status
    said = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert said["error"]["code"] == status
    assert status != 403 or "--allowed-host" in said["error"]["message"]
    assert ask(address) == 200


def test_a_flood_of_requests_ahead_of_an_answer_is_cut(address: tuple[str, int], application: Application) -> None:
    with connected(address) as client:
        client.sendall(post(1, "/slow") + b"x")
        time.sleep(0.1)
        sent = 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 100 << 20:
                sent += client.send(GET * 1000)
        assert sent < 50 << 20
        assert not application.goes_on.is_set()
    assert ask(address) == 200


FEW_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
from utils.serving.server import GatewayServer
from utils.serving.settings import ConnectionLimits

async def application(scope, receive, send):
    if scope["type"] == "http":
        with open(os.devnull, "rb"):  # whatever a request opens
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"ok"})

server = GatewayServer(application, ConnectionLimits(header_timeout_s=60), port=int(sys.argv[2]))
sys.exit(server.run_process(os._exit))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
@pytest.mark.parametrize("limit", [256, pytest.param(1024, marks=pytest.mark.slow)])
def test_idle_sockets_beyond_the_open_files_lock_nobody_out(limit: int) -> None:
    address = ("127.0.0.1", free_port())
    with start_python("-c", FEW_FILES, limit, address[1]) as process, contextlib.ExitStack() as stack:
        try:
            wait_until(lambda: ask(address), process)
            for _ in range(2 * limit):
                stack.enter_context(connected(address))
            began = time.monotonic()
            assert [ask(address) for _ in range(5)] == [200] * 5
            assert time.monotonic() - began < 1
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()
            _, errors = process.communicate()
    assert errors == ""
