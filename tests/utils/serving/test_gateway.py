"""The gateway on a tiny checkpoint, in front of a scripted backend."""

from __future__ import annotations

import concurrent.futures
import functools
import socket
import threading
import time
from typing import Any

import httpx
import pytest
import torch

from tests.support import gateway_server, prompts
from tests.support.fake_server import FakeServer, drop, refuse, rows_of, silence, stream
from tests.support.prompts import CHAT, CODE
from utils.compress.compressor import Compressor
from utils.model.markers import MEMORY_END, MEMORY_START, wrap

openai = pytest.importorskip("openai")

chat_body = functools.partial(prompts.chat_body, model="tiny")


def latents_of(compressor: Compressor, text: str) -> torch.Tensor:
    prompt = compressor.parse_raw(wrap(text))
    return compressor.encode_spans(prompt.spans)[0][0]


def test_chat_sends_latents_and_reports_them(
    gateway: httpx.Client, backend: FakeServer, compressor: Compressor
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    got = gateway.post(CHAT, json=chat_body(f"What is {wrap(CODE)}?", tools=tools, temperature=0.3))
    assert got.status_code == 200
    ((path, body),) = backend.requests
    assert path == CHAT
    before, part, after = body["messages"][0]["content"]
    assert (before["text"], after["text"]) == (f"What is {MEMORY_START}", f"{MEMORY_END}?")
    assert torch.equal(rows_of(part["data"]), latents_of(compressor, CODE))
    assert (body["tools"], body["temperature"]) == (tools, 0.3)
    answered = got.json()
    assert answered["choices"][0]["message"]["content"] == "fine"
    (span,) = answered["code_llava"]["spans"]
    assert span["latents"] == len(rows_of(part["data"])) == -(-span["tokens"] // 4)
    assert got.headers["x-code-llava-latents"] == str(span["latents"])


def test_completion_sends_the_whole_prompt_as_rows(
    gateway: httpx.Client, backend: FakeServer, compressor: Compressor
) -> None:
    text = f"Explain {wrap(CODE)} now"
    gateway.post("/v1/completions", json={"model": "tiny", "prompt": text, "max_tokens": 2}).raise_for_status()
    gateway.post("/v1/completions", json={"model": "tiny", "prompt": [text, "plain"]}).raise_for_status()
    expected = compressor.compress([compressor.parse_raw(text)])[0].values_TD
    one, two = (body for _, body in backend.requests)
    assert torch.equal(rows_of(one["prompt_embeds"]), expected)
    assert one.keys() == {"model", "max_tokens", "prompt_embeds"}
    assert torch.equal(rows_of(two["prompt_embeds"][0]), expected)
    assert len(two["prompt_embeds"]) == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body("hello")),
        (CHAT, chat_body([{"type": "text", "text": "hello"}])),
        ("/v1/completions", {"model": "tiny", "prompt": "hello"}),
        ("/v1/completions", {"model": "tiny", "prompt": [1, 2, 3]}),
    ],
)
def test_requests_without_markers_pass_through(
    gateway: httpx.Client, backend: FakeServer, path: str, body: dict[str, Any]
) -> None:
    got = gateway.post(path, json=body)
    assert backend.requests == [(path, body)]
    assert "code_llava" not in got.json()
    assert not [name for name in got.headers if name.startswith("x-code-llava")]


def test_the_openai_package_streams_through(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [stream("one ", "two")]
    with openai.OpenAI(base_url=f"{gateway.base_url}/v1", api_key="x", max_retries=0) as client:
        pieces = client.chat.completions.create(**chat_body(f"What is {wrap(CODE)}?"), stream=True)
        texts = [piece.choices[0].delta.content for piece in pieces if piece.choices]
    assert "".join(text or "" for text in texts) == "one two"


def test_a_second_request_takes_its_latents_from_the_cache(gateway: httpx.Client, backend: FakeServer) -> None:
    text = wrap("a text that no other test uses\n" * 5)
    first, second = (gateway.post(CHAT, json=chat_body(text)).json()["code_llava"] for _ in range(2))
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == second["memory_tokens"] > 0
    sent = [body["messages"][0]["content"][1]["data"] for _, body in backend.requests]
    assert torch.equal(rows_of(sent[0]), rows_of(sent[1]))


def test_stored_memories(gateway: httpx.Client, backend: FakeServer, compressor: Compressor) -> None:
    stored = gateway.post("/v1/memories", json={"text": CODE})
    assert stored.status_code == 201
    name = stored.json()["id"]
    assert [memory["id"] for memory in gateway.get("/v1/memories").json()["data"]] == [name]
    gateway.post(CHAT, json=chat_body(wrap("@" + name))).raise_for_status()
    part = backend.requests[-1][1]["messages"][0]["content"][1]
    assert torch.equal(rows_of(part["data"]), latents_of(compressor, CODE))
    assert gateway.delete(f"/v1/memories/{name}").json()["deleted"]
    assert gateway.post(CHAT, json=chat_body(wrap("@" + name))).status_code == 404
    assert gateway.delete(f"/v1/memories/{name}").status_code == 404
    assert gateway.post("/v1/memories", json={"text": " "}).status_code == 400


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        (CHAT, b"{", 400, "not JSON"),
        (CHAT, b"[]", 400, "must be a JSON object"),
        (CHAT, b"{}", 400, "messages must be a list"),
        (CHAT, b'{"messages":[{"role":"user","content":"<|memory_start|>x"}]}', 400, "without a"),
        (CHAT, b'{"messages":[{"role":"user","content":[{"type":"prompt_embeds","data":"x"}]}]}', 400, "from clients"),
        ("/v1/completions", b'{"prompt_embeds":"x"}', 400, "from clients"),
        ("/v1/completions", b'{"prompt":["<|memory_start|>x<|memory_end|>",[1]]}', 400, "cannot share"),
    ],
)
def test_bad_requests_end_here(
    gateway: httpx.Client, backend: FakeServer, path: str, content: bytes, status: int, message: str
) -> None:
    got = gateway.post(path, content=content)
    assert got.status_code == status
    assert message in got.json()["error"]["message"]
    assert backend.requests == []


def test_limits(compressor: Compressor, backend: FakeServer) -> None:
    limits = {"max_body_bytes": 2000, "max_spans": 2, "max_memories": 1}
    with gateway_server.running(compressor, backend.url, **limits) as url, httpx.Client(base_url=url) as gateway:
        json_type = {"Content-Type": "application/json"}
        assert gateway.post(CHAT, content=b"x" * 2001, headers=json_type).status_code == 413
        assert gateway.post(CHAT, json=chat_body(wrap("x") * 3)).status_code == 413
        assert gateway.post("/v1/memories", json={"text": "a"}).status_code == 201
    assert backend.requests == []


def test_keys(compressor: Compressor, backend: FakeServer) -> None:
    keys = {"api_keys": ("front",), "backend_key": "back"}
    with gateway_server.running(compressor, backend.url, **keys) as url, httpx.Client(base_url=url) as gateway:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer fr"}):
            refused = gateway.post(CHAT, json=chat_body("x"), headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        assert gateway.get("/metrics").status_code == 401
        assert gateway.get("/healthz").status_code == 200
        assert gateway.post(CHAT, json=chat_body("x"), headers={"Authorization": "Bearer front"}).status_code == 200
    assert set(backend.keys_seen) == {"Bearer back"}


def test_backend_errors_come_through_as_the_backend_said_them(gateway: httpx.Client, backend: FakeServer) -> None:
    said = {"error": {"message": "too long", "code": 400}}
    backend.script = [refuse(400, said), refuse(429, said, **{"Retry-After": "7"})]
    first, second = (gateway.post(CHAT, json=chat_body(wrap("x"))) for _ in range(2))
    assert (first.status_code, first.json()) == (400, said)
    assert (second.status_code, second.headers["Retry-After"]) == (429, "7")


def test_a_backend_that_is_gone_or_slow(compressor: Compressor, backend: FakeServer) -> None:
    with gateway_server.running(compressor, backend.url, timeout_s=0.3) as url, httpx.Client(base_url=url) as gateway:
        backend.script = [drop, silence(1)]
        assert gateway.post(CHAT, json=chat_body("x")).status_code == 502
        assert gateway.post(CHAT, json=chat_body("x")).status_code == 504
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with gateway_server.running(compressor, nowhere) as url, httpx.Client(base_url=url) as gateway:
            got = gateway.post(CHAT, json=chat_body("x"))
            assert got.status_code == 502
            assert nowhere not in got.text
            assert gateway.get("/healthz").status_code == 503


def test_a_stream_that_breaks_ends_with_an_error_event(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [stream("a", then=lambda handler: handler.reset())]
    got = gateway.post(CHAT, json=chat_body(wrap("x"), stream=True))
    assert '"content": "a"' in got.text
    assert '"error"' in got.text
    assert "[DONE]" not in got.text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_ends_the_backends_work(
    gateway: httpx.Client, backend: FakeServer, streamed: bool
) -> None:
    ended = threading.Event()

    def until_closed(handler: Any) -> None:
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            ended.set()

    backend.script = [stream("a", then=until_closed) if streamed else until_closed]
    with pytest.raises(httpx.TimeoutException):
        gateway.post(CHAT, json=chat_body(wrap("x"), stream=streamed), timeout=0.5)
    assert ended.wait(5)


class Stuck:
    """A compressor whose encoder waits, or fails."""

    def __init__(self, inner: Compressor, error: Exception | None = None) -> None:
        self._inner, self._error = inner, error
        self.released = threading.Event()
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_spans(self, spans: Any, *how: Any) -> Any:
        self.batches.append(len(spans))
        if self._error is not None:
            raise self._error
        assert self.released.wait(10)
        return self._inner.encode_spans(spans, *how)


def test_waiting_requests_are_encoded_together_and_more_are_told_to_come_back(
    compressor: Compressor, backend: FakeServer
) -> None:
    stuck = Stuck(compressor)
    with (
        gateway_server.running(stuck, backend.url, max_waiting=3) as url,
        httpx.Client(base_url=url, timeout=20) as gateway,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        answers = [pool.submit(gateway.post, CHAT, json=chat_body(wrap("x")))]
        _wait_for(lambda: stuck.batches == [1])
        answers += [pool.submit(gateway.post, CHAT, json=chat_body(wrap(f"{n}") * 2)) for n in range(3)]
        _wait_for(lambda: "code_llava_waiting_requests 3.0" in gateway.get("/metrics").text)
        refused = gateway.post(CHAT, json=chat_body(wrap("y")))
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        stuck.released.set()
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert stuck.batches == [1, 6]


def test_an_encoder_that_fails(compressor: Compressor, backend: FakeServer) -> None:
    broken = Stuck(compressor, RuntimeError("out of memory"))
    with gateway_server.running(broken, backend.url) as url, httpx.Client(base_url=url) as gateway:
        got = gateway.post(CHAT, json=chat_body(wrap("x")))
        assert got.status_code == 500
        assert "the encoder failed (RuntimeError)" in got.json()["error"]["message"]
    assert backend.requests == []
    with (
        gateway_server.running(broken, backend.url, on_error="plain-text") as url,
        httpx.Client(base_url=url) as gateway,
    ):
        got = gateway.post(CHAT, json=chat_body(f"a {wrap('x')} b"))
        assert got.json()["code_llava"]["fallback"] == "plain-text"
        assert got.headers["x-code-llava-fallback"] == "plain-text"
        assert backend.requests[-1][1]["messages"][0]["content"] == [{"type": "text", "text": "a x b"}]
        gateway.post("/v1/completions", json={"prompt": f"a {wrap('x')} b"})
        assert backend.requests[-1][1]["prompt"] == "a x b"


def test_models_and_metrics(gateway: httpx.Client) -> None:
    listed = gateway.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed if "code_llava" not in model] == ["tiny"]
    counters = (f'code_llava_requests_total{{endpoint="{CHAT}",status="200"}}', "code_llava_spans_total")

    def counts() -> list[float]:
        shown = dict(line.rsplit(" ", 1) for line in gateway.get("/metrics").text.splitlines())
        return [float(shown.get(name, 0)) for name in counters]

    before = counts()
    gateway.post(CHAT, json=chat_body(wrap(CODE)))
    assert counts() == [number + 1 for number in before]


def test_concurrent_clients_get_their_own_latents(
    compressor: Compressor, backend: FakeServer, gateway: httpx.Client
) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bodies = [chat_body(f"{n} {wrap(f'secret number {n}')}") for n in range(12)]
        assert {got.status_code for got in pool.map(lambda body: gateway.post(CHAT, json=body), bodies)} == {200}
    assert len(backend.requests) == 12
    for _, body in backend.requests:
        before, part, _ = body["messages"][0]["content"]
        number = before["text"].split()[0]
        expected = latents_of(compressor, f"secret number {number}")
        assert torch.equal(rows_of(part["data"]), expected)


def _wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
