"""The gateway as a process: start, answer, warn, end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import fake_server
from tests.support.fake_server import stream
from tests.support.processes import free_port, start_python, wait_until
from tests.support.prompts import CHAT, chat_body
from utils.model.markers import wrap
from utils.serving import gateway

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 40])
def test_sigterm_lets_streams_finish(checkpoints: dict[str, Path], tmp_path: Path, clients: int) -> None:
    port = free_port()
    with fake_server.running() as backend:
        backend.part_separator = "\n"
        goes_on = threading.Event()

        def slow_end(handler: Any) -> None:
            goes_on.wait(60)
            end = {"choices": [{"index": 0, "finish_reason": "stop", "delta": {"content": "end"}}]}
            handler.wfile.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())

        command = [
            "-m", "utils.serving.gateway", "--checkpoint", str(checkpoints["lclm"]), "--device", "cpu",
            "--backend-url", backend.url, "--port", str(port), "--cache-dir", str(tmp_path),
        ]  # fmt: skip
        process = start_python(*command)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: urllib.request.urlopen(f"{url}/healthz").close() is None, process, 180)
            backend.default_action = stream("begin ", then=slow_end)
            begun = threading.Barrier(clients + 1)

            def follow(number: int) -> str:
                with httpx.stream("POST", url + CHAT, json=body(number), timeout=60) as answer:
                    lines = answer.iter_lines()
                    first = next(lines)
                    begun.wait(60)
                    return first + "".join(lines)

            with ThreadPoolExecutor(clients) as pool:
                answers = [pool.submit(follow, number) for number in range(clients)]
                begun.wait(60)
                process.send_signal(signal.SIGTERM)
                _wait_until_refused(port)
                goes_on.set()
                for answer in answers:
                    assert "begin" in answer.result(60)
                    assert '"end"' in answer.result()
                    assert answer.result().endswith("[DONE]")
            assert process.wait(20) == 0
        finally:
            process.kill()
            _, errors = process.communicate()
    assert "newline before and after every span" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gateway.example.org", ""])
def test_an_address_that_others_reach_needs_a_key(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(gateway.KEY_VARIABLE, raising=False)
    open_address = ["--host", host, "--checkpoint", "no-such-checkpoint"]
    assert gateway.main(open_address) == 1
    said = capsys.readouterr().err
    assert "--api-key" in said
    assert "--allow-no-key" in said
    # With leave, it goes on to the checkpoint that is not there, and says aloud what it does.
    assert gateway.main([*open_address, "--allow-no-key"]) == 1
    assert "no-such-checkpoint" in capsys.readouterr().err
    assert "NO KEY" in caplog.text
    caplog.clear()
    assert gateway.main([*open_address, "--api-key", "secret"]) == 1
    assert "no-such-checkpoint" in capsys.readouterr().err
    assert "NO KEY" not in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        ("--allowed-origin", "*"),
        ("--allowed-host", "a,http://b"),
        ("--expand", "2"),
        ("--expand-policy", "answer", "--expand", "1/2"),
        ("--expand-tokens", "-1"),
    ],
)
def test_flags_are_checked_before_the_checkpoint(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway.main([*flags, "--checkpoint", "no-such-checkpoint"]) == 1
    assert flags[0] in capsys.readouterr().err


def body(number: int) -> dict[str, Any]:
    return chat_body(wrap(f"def f_{number}(): pass"), model="tiny", stream=True)


def _wait_until_refused(port: int) -> None:
    """A server that shuts down takes no new connections, but goes on with those it has."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError("the gateway still takes connections")
