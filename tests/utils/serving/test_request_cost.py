"""What a request expands to is counted before work begins, and no body makes the gateway fail."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.campaign.api_grammar import Grammar
from tests.support import fake_server, gateway_server, local_gateway, prompts
from tests.support.fake_server import FakeServer
from tests.support.prompts import CHAT, COMPLETIONS
from tests.support.tiny import MAX_POSITIONS
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.model.markers import wrap

CHUNK = 4

chat_body = functools.partial(prompts.chat_body, max_tokens=1)


@pytest.fixture(scope="module")
def compressor(checkpoints: dict[str, Path]) -> Compressor:
    return Compressor.load(checkpoints["lclm"], settings=ON_CPU)


class Counting:
    """A compressor that counts what is asked of its encoder and of its tokenizers."""

    def __init__(self, inner: Compressor) -> None:
        self._inner = inner
        self.encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_spans(self, spans: Any, *how: Any) -> Any:
        self.encoded += len(spans)
        return self._inner.encode_spans(spans, *how)


@pytest.fixture(scope="module")
def backend() -> Iterator[FakeServer]:
    with fake_server.running() as running:
        yield running


@pytest.fixture(scope="module")
def counting(compressor: Compressor) -> Counting:
    return Counting(compressor)


@pytest.fixture(scope="module")
def vllm(counting: Counting, backend: FakeServer) -> Iterator[str]:
    with gateway_server.running(counting, backend.url) as url:
        yield url


@pytest.fixture(scope="module")
def local(counting: Any) -> Iterator[str]:
    with local_gateway.running(counting) as url:
        yield url


@pytest.fixture(params=["vllm", "local"])
def gateway(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=request.getfixturevalue(request.param), timeout=60) as client:
        yield client


LONG = "x" * (MAX_POSITIONS * CHUNK + 1)
TOO_LONG = {
    "one span": (COMPLETIONS, {"prompt": wrap(LONG)}),
    "one span of a chat": (CHAT, chat_body(wrap(LONG))),
    "many small spans": (CHAT, chat_body(wrap("x") * 300)),
    "small spans in many messages": (CHAT, {"messages": [{"role": "user", "content": wrap("x" * 40)}] * 60}),
    "text around a span": (COMPLETIONS, {"prompt": wrap("x") + "y" * MAX_POSITIONS}),
    "one prompt of several": (COMPLETIONS, {"prompt": ["a", wrap(LONG), "b"]}),
    "several prompts together": (COMPLETIONS, {"prompt": [wrap("x" * 1000)] * 20}),
    "a long list of prompts": (COMPLETIONS, {"prompt": ["a"] * (4 * MAX_POSITIONS) + [wrap("x")]}),
    "a span of megabytes": (CHAT, chat_body(wrap("x" * 4_000_000))),
}
TOO_LONG_LOCALLY = {
    "text": (COMPLETIONS, {"prompt": "y" * (MAX_POSITIONS + 1)}),
    "text of megabytes": (COMPLETIONS, {"prompt": "y" * 8_000_000}),
    "token ids": (COMPLETIONS, {"prompt": [1] * (MAX_POSITIONS + 1)}),
    "token ids in a list": (COMPLETIONS, {"prompt": [[1] * (MAX_POSITIONS + 1)]}),
    "a chat": (CHAT, chat_body("y" * MAX_POSITIONS)),
    "a chat's parts": (CHAT, chat_body([{"type": "text", "text": "y"}] * MAX_POSITIONS)),
    "a chat's text around a span": (CHAT, chat_body(wrap("x") + "y" * MAX_POSITIONS)),
    "many messages": (CHAT, {"messages": [{"role": "user", "content": ""}] * 20_000}),
}


def assert_refused(client: httpx.Client, counting: Counting, path: str, body: dict[str, Any], limit: int) -> None:
    before, began = counting.encoded, time.process_time()
    got = client.post(path, json=body)
    assert got.status_code == 413, got.text
    assert str(limit) in got.json()["error"]["message"]
    assert counting.encoded == before
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", TOO_LONG)
def test_what_has_no_room_is_refused_unencoded(gateway: httpx.Client, counting: Counting, name: str) -> None:
    together = 4 if "several prompts" in name or "list of prompts" in name else 1
    assert_refused(gateway, counting, *TOO_LONG[name], limit=together * MAX_POSITIONS)


@pytest.mark.parametrize("name", TOO_LONG_LOCALLY)
def test_the_local_decoders_text_counts_too(local: str, counting: Counting, name: str) -> None:
    with httpx.Client(base_url=local, timeout=60) as client:
        assert_refused(client, counting, *TOO_LONG_LOCALLY[name], limit=MAX_POSITIONS)


def test_a_vllm_server_judges_text_and_ids_itself(vllm: str) -> None:
    for name in ("text", "token ids", "a chat"):
        path, body = TOO_LONG_LOCALLY[name]
        assert httpx.post(vllm + path, json=body).status_code == 200


def test_the_longest_prompt_goes_through(local: str) -> None:
    # Start, latents, end; and one new token.
    text = "x" * ((MAX_POSITIONS - 3) * CHUNK)
    assert httpx.post(local + COMPLETIONS, json={"prompt": wrap(text), "max_tokens": 1}).status_code == 200


def test_references_cost_no_more_than_one(gateway: httpx.Client, counting: Counting) -> None:
    text = "".join(f"value_{i} = {i}\n" for i in range(100))
    name = gateway.post("/v1/memories", json={"text": text}).json()["id"]
    one = len(text) // CHUNK + 3
    assert_refused(gateway, counting, COMPLETIONS, {"prompt": wrap("@" + name) * 512}, MAX_POSITIONS)
    assert MAX_POSITIONS // one >= 1
    assert gateway.post(COMPLETIONS, json={"prompt": wrap("@" + name), "max_tokens": 1}).status_code == 200
    huge = gateway.post("/v1/memories", json={"text": "y" * 2_000_000}).json()["id"]
    for _ in range(2):
        assert_refused(gateway, counting, CHAT, chat_body(wrap("@" + huge)), MAX_POSITIONS)


def test_bytes_of_references_count(compressor: Compressor, backend: FakeServer) -> None:
    with (
        gateway_server.running(compressor, backend.url, max_body_bytes=10_000) as url,
        httpx.Client(base_url=url) as gateway,
    ):
        name = gateway.post("/v1/memories", json={"text": " " * 5000 + "x"}).json()["id"]
        got = gateway.post(CHAT, json=chat_body(wrap("@" + name) * 3))
        assert got.status_code == 413
        assert "10000" in got.json()["error"]["message"]


@pytest.mark.slow
def test_others_do_not_wait_for_long_bodies(gateway: httpx.Client) -> None:
    parts = [{"type": "text", "text": "y" * 28}] * 60_000 + [{"type": "text", "text": wrap("x")}]
    bodies = [chat_body(parts), chat_body("<" * 20_000_000 + wrap("x" * LONG.count("x")))]
    # A body that the others wait for holds them up in every try; other programs on a busy machine do not.
    longest = [longest_wait(gateway, bodies)]
    while longest[-1] >= 1 and len(longest) < 5:
        longest.append(longest_wait(gateway, bodies))
    assert min(longest) < 1


def longest_wait(gateway: httpx.Client, bodies: list[Any]) -> float:
    """Seconds that a small request waits at most while bodies are sent."""
    done = threading.Event()
    waits: list[float] = []

    def probe() -> None:
        with httpx.Client(base_url=gateway.base_url, timeout=60) as other:
            while not done.is_set():
                began = time.perf_counter()
                assert other.get("/page.css").status_code == 200
                waits.append(time.perf_counter() - began)
                time.sleep(0.01)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        for body in bodies:
            assert gateway.post(CHAT, json=body).status_code in (200, 413)
    finally:
        done.set()
        thread.join()
    return max(waits)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/compress", "/v1/memories"])
def test_no_body_makes_a_500(gateway: httpx.Client, path: str) -> None:
    # The campaign sends many more.
    grammar = Grammar(7)
    statuses = set()
    for _ in range(25):
        raw = grammar.body(path)
        got = gateway.post(path, content=raw, headers={"Content-Type": "application/json"})
        assert got.status_code < 500, (raw[:300], got.text)
        if got.status_code >= 400:
            assert len(got.json()["error"]["message"]) < 1000
        statuses.add(got.status_code)
    assert {400} < statuses


@pytest.mark.parametrize("depth", [100, 300, 1000, 10_000])
@pytest.mark.parametrize("name", ["user", "code_llava", "stop", "metadata"])
def test_deep_fields(gateway: httpx.Client, depth: int, name: str) -> None:
    raw = f'{{"{name}":{"[" * depth}{"]" * depth},"prompt":"a {wrap("x")}","max_tokens":1}}'.encode()
    got = gateway.post(COMPLETIONS, content=raw, headers={"Content-Type": "application/json"})
    assert got.status_code == 400 if depth > 128 or name == "code_llava" else got.status_code < 500
    if got.status_code == 400:
        assert name in got.json()["error"]["message"]


@pytest.mark.parametrize("text", [5, None, ["a"], {}])
def test_a_text_that_is_none_is_named(gateway: httpx.Client, text: Any) -> None:
    got = gateway.post(CHAT, json=chat_body([{"type": "text", "text": text}, {"type": "text", "text": wrap("x")}]))
    assert got.status_code == 400
    assert "message 0, part 0: the field text" in got.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stop": ["x"] * 100}, "100"),
        ({"stop": "x" * 5000}, "5000"),
        ({"seed": 1 << 63}, "seed"),
        ({"max_tokens": (1 << 63) - 1}, str(MAX_POSITIONS)),
        ({"prompt": [1, True]}, "token ids"),
        ({"prompt": [264]}, "264"),
    ],
)
def test_values_without_bounds(local: str, fields: dict[str, Any], named: str) -> None:
    got = httpx.post(local + COMPLETIONS, json={"prompt": "x", "max_tokens": 1, **fields})
    assert got.status_code == 400
    assert named in got.json()["error"]["message"]


def test_the_smallest_temperature_is_greedy(local: str) -> None:
    texts = [
        httpx.post(local + COMPLETIONS, json={"prompt": "x", "temperature": temperature}).json()["choices"][0]["text"]
        for temperature in (0, 1e-300)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("content", [b"[1]", b"{", b"", b'"x"', b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"])
def test_an_answer_that_cannot_be_read_is_the_backends_fault(vllm: str, backend: FakeServer, content: bytes) -> None:
    backend.script = [lambda handler: handler.reply(200, content)]
    got = httpx.post(vllm + CHAT, json=chat_body(wrap("x")))
    assert got.status_code == 502
    assert got.json()["error"]["type"] == "server_error"


def test_the_limits_are_told(gateway: httpx.Client) -> None:
    limits = gateway.get("/v1/compression").json()["limits"]
    assert (limits["prompt_rows"], limits["request_rows"]) == (MAX_POSITIONS, 4 * MAX_POSITIONS)
    assert {"body_bytes", "body_depth", "body_values", "spans", "memories", "memory_ttl_seconds"} <= limits.keys()
