"""A small OpenAI-compatible server whose next answers a test scripts: actions that answer, stream or misbehave.

As a program it answers by prompt, with faults, until it is killed; its first line is its address.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

Action = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers `/v1/models` and `/tokenize` itself; completions follow the server's script."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.keys_seen.append(self.headers["Authorization"])
        if self.server.models_action is not None:
            self.server.models_action(self)
        else:
            listed = [{"id": name, "object": "model", "max_model_len": 4096} for name in self.server.models]
            self.reply(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked = body = json.loads(self.body)
        if self.path == "/tokenize":
            content = body["messages"][0]["content"]
            if not isinstance(content, str):
                content = self.server.part_separator.join(part["text"] for part in content)
            self.reply(200, {"tokens": list(content.encode())})
            return
        if self.server.keeps_requests:
            self.server.requests.append((self.path, body))
            self.server.keys_seen.append(self.headers["Authorization"])
        action = self.server.script.pop(0) if self.server.script else self.server.default_action
        action(self)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send a JSON body (or raw bytes)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reset(self) -> None:
        """Lose the connection the hard way, as when a process is killed."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class FakeServer(ThreadingHTTPServer):
    """The server; `script` holds one action a completion request, `default_action` answers all that follow."""

    request_queue_size = 256
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, action: Action, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.forget(action)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def forget(self, action: Action) -> None:
        """Begin again: no script, no requests, and one action for all that come."""
        self.models = ["tiny"]
        self.models_action: Action | None = None
        self.part_separator = ""
        self.script: list[Action] = []
        self.default_action = action
        self.keeps_requests = True
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys_seen: list[str] = []

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """What the kept requests sent."""
        return [body for _, body in self.requests]

    @property
    def prompts(self) -> list[Any]:
        """What the kept requests asked."""
        return [prompt_of(body) for body in self.bodies]


@contextlib.contextmanager
def running(action: Action | None = None, *, port: int = 0) -> Iterator[FakeServer]:
    """Serve until the block ends, on any free port unless one is given; without an action, every answer is "fine".

    Skips the test where the client is not installed.
    """
    for package in ("openai", "orjson", "pybase64"):
        pytest.importorskip(package)
    with FakeServer(action or answer("fine"), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def rows_of(blob: str) -> torch.Tensor:
    """What a prompt_embeds blob holds, read as a server reads it."""
    return torch.load(io.BytesIO(base64.b64decode(blob, validate=True)), weights_only=True)


def prompt_of(body: dict[str, Any]) -> Any:
    """What a request asks: its last message, its text, or its blob of rows."""
    return body["messages"][-1]["content"] if "messages" in body else body.get("prompt") or body["prompt_embeds"]


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def answer(text: str, **usage: int) -> Action:
    """Answer with a completion or chat completion, streamed when asked for; `usage` replaces counts of `USAGE`."""

    def act(handler: Handler) -> None:
        if handler.asked.get("stream"):
            stream(*text)(handler)
            return
        said = {"message": {"role": "assistant", "content": text}} if "chat" in handler.path else {"text": text}
        choice = {"index": 0, "finish_reason": "stop", **said}
        handler.reply(200, {"choices": [choice], "usage": {**USAGE, **usage}})

    return act


def answer_to(prompt: str) -> str:
    """The one answer that `by_prompt` has for a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def by_prompt(handler: Handler) -> None:
    """Answer so that a test can tell which prompt was asked; a prompt token is a word."""
    prompt = prompt_of(handler.asked)
    answer(answer_to(prompt), prompt_tokens=len(prompt.split()))(handler)


def stream(*pieces: str, then: Action | None = None) -> Action:
    """Stream pieces; `then` replaces the regular end."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True

        def send(value: Any) -> None:
            handler.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            handler.wfile.flush()

        for piece in pieces:
            said: dict[str, Any] = {"delta": {"content": piece}} if "chat" in handler.path else {"text": piece}
            send({"choices": [{"index": 0, "finish_reason": None, **said}]})
        if then is not None:
            then(handler)
            return
        said = {"delta": {}} if "chat" in handler.path else {"text": ""}
        send({"choices": [{"index": 0, "finish_reason": "length", **said}]})
        send({"choices": [], "usage": USAGE})
        handler.wfile.write(b"data: [DONE]\n\n")

    return act


def refuse(status: int, body: Any, **headers: str) -> Action:
    """Answer with a status and a body of one's own."""
    return lambda handler: handler.reply(status, body, headers)


def drop(handler: Handler) -> None:
    """Lose the connection without an answer."""
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def silence(seconds: float, then: Action = drop) -> Action:
    """Say nothing for a while; by default, lose the connection then."""

    def act(handler: Handler) -> None:
        time.sleep(seconds)
        then(handler)

    return act


def drip(seconds: float) -> Action:
    """Begin to answer, and send one byte after the other for so long."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.02)
        handler.close_connection = True

    return act


def event(value: Any) -> Action:
    """One more event of a stream, and its end."""
    return lambda handler: handler.wfile.write(f"data: {json.dumps(value)}\n\n".encode()) and None


_NO_ANSWERS = itertools.cycle(
    [b"[]", b"null", b"3", b'"text"', b"", b'{"choices": "x"}', b'{"choices": [{"text": null}]}', b"\xff"]
)
# What another try may cure.
FAULTS: dict[str, Action] = {
    "error500": refuse(500, {"error": {"message": "boom"}}),
    "overload429": refuse(429, {"error": {"message": "slow down"}}, **{"Retry-After": "0.01"}),
    "drop": drop,
    "garbage": refuse(200, b'{"choices": [{"text": "cut of'),
    "wrong_shape": refuse(200, {"object": "text_completion", "choices": [], "detail": "?"}),
    "html": refuse(200, b"<html>bad gateway</html>", **{"Content-Type": "text/html"}),
    "other_json": lambda handler: handler.reply(200, next(_NO_ANSWERS)),
    "hang": silence(0.3),
    "drip": drip(5.0),
}


def faulty(*names: str, rate: float = 0.4, seed: int = 0, otherwise: Action = by_prompt) -> Action:
    """Answer by prompt, or as told, but let a share of the requests end in one of these `FAULTS`."""
    rng, faults = random.Random(seed), [FAULTS[name] for name in names]
    return lambda handler: (rng.choice(faults) if rng.random() < rate else otherwise)(handler)


if __name__ == "__main__":
    with running(silence(0.02, then=faulty("error500", "drop", "garbage", rate=0.2))) as alone:
        print(alone.url, flush=True)
        threading.Event().wait()
