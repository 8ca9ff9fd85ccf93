"""A small OpenAI-compatible server with a real socket and a list of misdeeds."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

FAULTS = ("error500", "overload429", "drop", "garbage", "wrong_shape", "html", "other_json", "hang")


def answer_to(prompt: str) -> str:
    """The one answer this server has for a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


class FakeServer:
    """Serves in threads of this process; use as a context manager.

    Args:
        fault_rate: Share of completion requests that go wrong, by a random choice among `faults`.
        delay_s: Before each answer.
        status: Answer each completion with this status (401, 404, 400…).
    """

    def __init__(self, *, fault_rate=0.0, faults=FAULTS, delay_s=0.0, status=200, hang_s=2.0, seed=0, reject=None):
        for package in ("openai", "orjson", "pybase64"):
            pytest.importorskip(package)  # what the client asks this server with
        self.fault_rate, self.faults, self.delay_s, self.status = fault_rate, faults, delay_s, status
        self.hang_s, self.reject = hang_s, reject
        self.rng = random.Random(seed)
        self.prompts: list[str] = []
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer._send(self, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.keys.add(self.headers["authorization"])
                    outer._in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer._in_flight)
                try:
                    outer._complete(self, body)
                finally:
                    with outer._lock:
                        outer._in_flight -= 1

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    def _complete(self, handler, body):
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body.get("prompt") or body["prompt_embeds"]
        with self._lock:
            self.prompts.append(prompt)
            self.bodies.append(body)
            fault = self.rng.choice(self.faults) if self.rng.random() < self.fault_rate else None
        if self.status != 200 or (self.reject and self.reject in prompt):
            status = self.status if self.status != 200 else 400
            return self._send(handler, status, {"error": {"message": "this server says no", "code": status}})
        time.sleep(self.delay_s)
        if fault:
            return self._misbehave(handler, fault)
        text = answer_to(prompt)
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 1, "total_tokens": 2}
        kind = "chat.completion" if chat else "text_completion"
        reply = {"id": "1", "object": kind, "created": 1, "model": body["model"], "choices": [choice], "usage": usage}
        return self._send(handler, 200, reply)

    def _misbehave(self, handler, fault):
        if fault == "error500":
            self._send(handler, 500, {"error": {"message": "boom"}})
        elif fault == "overload429":
            self._send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"})
        elif fault == "garbage":
            self._send(handler, 200, b'{"choices": [{"text": "cut of')
        elif fault == "wrong_shape":
            self._send(handler, 200, {"object": "text_completion", "choices": [], "detail": "?"})
        elif fault == "other_json":
            bodies = (
                b"[]",
                b"null",
                b"3",
                b'"text"',
                b"",
                b'{"choices": "x"}',
                b'{"choices": [{"text": null}]}',
                b"\xff",
            )
            self._send(handler, 200, self.rng.choice(bodies))
        elif fault == "html":
            self._send(handler, 200, b"<html>bad gateway</html>", {"Content-Type": "text/html"})
        elif fault == "hang":
            time.sleep(self.hang_s)
            handler.close_connection = True
        elif fault == "drop":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _send(handler, status, body, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


def main():
    """Serve until killed; prints the URL. For tests that kill their client."""
    with FakeServer(fault_rate=0.2, faults=("error500", "drop", "garbage"), delay_s=0.02) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
