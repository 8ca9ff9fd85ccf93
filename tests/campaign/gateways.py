"""A gateway in a process of its own, as users start it, with what can be seen of it from outside.

with running(tools, work) as gateway:               # its decoder answers
    gateway.url, gateway.resident_bytes(), gateway.num_files()
gateway.log_complaints()                            # tracebacks
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.campaign.api_grammar import KEYS
from tests.campaign.jobs import Tools
from tests.support.processes import free_port, wait_until
from utils.files import PROJECT_ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGateway:
    """A gateway's process.

    Attributes:
        url: Its address.
        process: It.
        log: File of what it says.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = httpx.URL(self.url)
        return parts.host, parts.port or 80

    def resident_bytes(self) -> int:
        """Memory of its own that it holds."""
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no Private_Dirty")

    def num_files(self) -> int:
        """Files and sockets that it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def num_threads(self) -> int:
        """Its threads."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def complaints(self) -> list[str]:
        """Tracebacks in its log, or its end."""
        log = self.log.read_text(errors="replace")
        found = [log[at : at + 1500] for at in range(len(log)) if log.startswith("Traceback", at)]
        return found[:3] + ([f"it ended with {self.process.returncode}"] if self.process.poll() is not None else [])

    def stop(self) -> tuple[int, float]:
        """Send SIGTERM; its exit code, and the seconds that took (60: it had to be killed)."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60), time.monotonic() - began
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(), 60.0


@contextlib.contextmanager
def running(tools: Tools, work: Path, *flags: str, backend_url: str | None = None) -> Iterator[RunningGateway]:
    """Start a gateway, with its decoder or in front of a server, and end it with the block."""
    work.mkdir(parents=True, exist_ok=True)
    port = free_port()
    backend = ["--backend", "local"] if backend_url is None else ["--backend-url", backend_url]
    keys = [flag for key in KEYS for flag in ("--api-key", key)]
    command = [
        sys.executable, "-m", "utils.serving.gateway", "--checkpoint", str(tools.checkpoint), "--device", "cpu",
        "--port", str(port), "--cache-dir", str(work / "cache"), "--max-body-mb", "2", *keys, *backend, *flags,
    ]  # fmt: skip
    log = work / "gateway.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
        )
    gateway = RunningGateway(url=f"http://127.0.0.1:{port}", process=process, log=log)
    try:
        wait_until(lambda: _answers(gateway.url), process, 120)  # type: ignore[arg-type]
        yield gateway
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def ask_the_canary(gateway: RunningGateway) -> str:
    """One request that is always the same, and its answer."""
    question = "<|memory_start|>value = 4711<|memory_end|> What is value?"
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 4, "temperature": 0}
    got = httpx.post(
        f"{gateway.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEYS[0]}"}, timeout=60
    )
    return f"{got.status_code} {got.json()['choices'][0]['message']['content']}" if got.status_code == 200 else got.text
