"""The gateway's end: whatever runs, the process is gone in time."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.processes import free_port, start_python, wait_until

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

# Streams at /stream, works in a thread that Python waits for at /thread.
PROCESS = """
import asyncio, concurrent.futures, os, sys, time
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from utils.serving.server import GatewayServer
from utils.serving.settings import ConnectionLimits

pool = concurrent.futures.ThreadPoolExecutor(1)

async def stream(request):
    async def pieces():
        for number in range(int(request.query_params["pieces"])):
            yield f"{number}\\n"
            await asyncio.sleep(0.1)
    return StreamingResponse(pieces())

async def thread(request):
    work = asyncio.get_running_loop().run_in_executor(pool, time.sleep, 600)
    if "left" not in request.query_params:
        await work
    return PlainTextResponse("left")

app = Starlette(routes=[Route("/stream", stream), Route("/thread", thread)])
limits = ConnectionLimits(shutdown_s=1.5, header_timeout_s=60, keep_alive_s=60)
sys.exit(GatewayServer(app, limits, port=int(sys.argv[1])).run_process(os._exit))
"""
HEAD = " HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Running:
    """The process and its address."""

    def __init__(self) -> None:
        self.address = ("127.0.0.1", free_port())
        self.process = start_python("-c", PROCESS, self.address[1])
        wait_until(lambda: self.send("").close() is None, self.process)

    def send(self, text: str) -> socket.socket:
        client = socket.create_connection(self.address, timeout=20)
        client.sendall(text.encode())
        return client

    def seconds_to_end(self) -> float:
        began = time.monotonic()
        self.process.wait(30)
        return time.monotonic() - began


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running()
    try:
        yield server
    finally:
        server.process.kill()
        _, errors = server.process.communicate()
    assert "Traceback" not in errors


def test_what_waits_for_its_client_is_closed_at_once(running: Running) -> None:
    halves = ["", "GET / HT", "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx", "GET /none" + HEAD]
    with contextlib.ExitStack() as stack:
        for half in halves:
            stack.enter_context(running.send(half))
        time.sleep(0.2)
        running.process.terminate()
        assert running.seconds_to_end() < 1.4
    assert running.process.returncode == 0


def test_a_running_answer_ends_whole(running: Running) -> None:
    with running.send("GET /stream?pieces=8" + HEAD) as client:
        assert client.recv(1000)
        running.process.terminate()
        assert running.seconds_to_end() < 3
        got = b""
        while piece := client.recv(1000):
            got += piece
        assert got.endswith(b"0\r\n\r\n")  # the last chunk
    assert running.process.returncode == 0


@pytest.mark.parametrize(
    "path",
    [
        "/stream?pieces=900",
        pytest.param("/thread", marks=pytest.mark.slow),
        pytest.param("/thread?left", marks=pytest.mark.slow),
    ],
)
def test_a_long_answer_is_cut_and_a_thread_that_hangs_is_left(running: Running, path: str) -> None:
    with running.send(f"GET {path}{HEAD}"):
        time.sleep(0.3)
        running.process.terminate()
        assert 1 < running.seconds_to_end() < 8
    assert running.process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others")
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(running: Running, second: signal.Signals) -> None:
    with running.send("GET /stream?pieces=900" + HEAD) as client:
        assert client.recv(1000)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        running.process.send_signal(second)
        assert running.seconds_to_end() < 0.8
    assert running.process.returncode == 128 + second


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others")
def test_ctrl_c_is_told_from_a_regular_end(running: Running) -> None:
    running.process.send_signal(signal.SIGINT)
    assert running.seconds_to_end() < 1.4
    assert running.process.returncode == 130
