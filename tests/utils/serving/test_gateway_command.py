"""The gateway as a process: start, answer, warn, end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import fake_server
from tests.support.fake_server import stream
from utils.model.markers import MEMORY_END, MEMORY_START

BODY: dict[str, Any] = {
    "model": "tiny", "stream": True,
    "messages": [{"role": "user", "content": f"{MEMORY_START}def f(): pass{MEMORY_END}"}],
}  # fmt: skip


@pytest.mark.slow
def test_sigterm_lets_a_stream_finish(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with fake_server.running() as backend:
        backend.part_separator = "\n"
        goes_on = threading.Event()

        def slow_end(handler: Any) -> None:
            goes_on.wait(20)
            end = {"choices": [{"index": 0, "finish_reason": "stop", "delta": {"content": "end"}}]}
            handler.wfile.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())

        command = [
            sys.executable, "-m", "utils.serving.gateway", "--checkpoint", str(checkpoints["lclm"]), "--device", "cpu",
            "--backend-url", backend.url, "--port", str(port), "--cache-dir", str(tmp_path),
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_up(url, process)
            backend.script = [stream("begin ", then=slow_end)]
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=20) as answer:
                lines = answer.iter_lines()
                assert "begin" in next(lines)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                goes_on.set()
                rest = "".join(lines)
            assert '"end"' in rest
            assert "[DONE]" in rest
            assert process.wait(20) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            _, errors = process.communicate()
    assert "newline before and after every span" in errors
    assert "Traceback" not in errors


def _wait_until_up(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the gateway did not start")
