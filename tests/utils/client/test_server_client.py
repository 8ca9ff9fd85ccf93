"""The client against a scripted server: requests, streams, retries, faults, preflight."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("openai")
pytest.importorskip("orjson")

from tests.support import fake_server
from tests.support.fake_server import FakeServer, Handler, answer, drip, drop, event, refuse, rows_of, silence, stream
from utils.client.completion import Completion, RetryPolicy
from utils.client.connection import RequestError
from utils.client.server_client import VllmClient
from utils.errors import ConfigError, DatasetError, ServerError

ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server.running() as running:
        yield running


def use(server: FakeServer | str, action: Callable[[VllmClient], Awaitable[Any]], **settings: Any) -> Any:
    """Run one action with a client that waits little."""
    settings.setdefault("retry", RetryPolicy(first_wait_s=0.01))

    async def run() -> Any:
        async with VllmClient(server if isinstance(server, str) else server.url, **settings) as client:
            return await action(client)

    return asyncio.run(run())


def test_completion_sends_rows_and_fields(server: FakeServer) -> None:
    server.script = [answer("hello")]
    got = use(server, lambda client: client.complete(ROWS, max_tokens=3, temperature=0, top_k=20, stop=None))
    assert isinstance(got, Completion)
    assert (got.text, got.finish_reason) == ("hello", "stop")
    assert (got.prompt_tokens, got.completion_tokens, got.cached_tokens) == (7, 3, 4)
    assert got.first_text_s is None
    ((path, body),) = server.requests
    assert path == "/v1/completions"
    assert torch.equal(rows_of(body.pop("prompt_embeds")), ROWS)
    assert body == {"model": "tiny", "max_tokens": 3, "temperature": 0, "top_k": 20}


def test_text_and_wire_dtype(server: FakeServer) -> None:
    use(server, lambda client: client.complete("once"))
    assert server.requests[0][1] == {"model": "tiny", "prompt": "once"}
    use(server, lambda client: client.complete(ROWS), dtype=torch.bfloat16)
    assert torch.equal(rows_of(server.requests[1][1]["prompt_embeds"]), ROWS.bfloat16())


def test_chat_mixes_text_and_rows(server: FakeServer) -> None:
    def action(client: VllmClient) -> Awaitable[Completion]:
        content = [{"type": "text", "text": "a"}, client.embeds_part(ROWS)]
        return client.chat([{"role": "user", "content": content}], tools=[{"type": "function"}])

    assert use(server, action, model="other").text == "fine"
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert (body["model"], body["tools"]) == ("other", [{"type": "function"}])
    text, part = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "a"}
    assert part["type"] == "prompt_embeds"
    assert torch.equal(rows_of(part["data"]), ROWS)


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_gives_pieces_and_the_same_answer(server: FakeServer, chat: bool) -> None:
    server.script = [stream("he", "l", "lo")]
    pieces: list[str] = []

    def action(client: VllmClient) -> Awaitable[Completion]:
        if chat:
            return client.chat([{"role": "user", "content": "x"}], on_text=pieces.append)
        return client.complete("x", on_text=pieces.append)

    got = use(server, action)
    assert pieces == ["he", "l", "lo"]
    assert (got.text, got.finish_reason, got.prompt_tokens) == ("hello", "length", 7)
    assert 0 < got.first_text_s <= got.total_s
    assert server.requests[0][1]["stream_options"] == {"include_usage": True}


def test_keys_travel_as_bearer(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    use(server, lambda client: client.complete("x"))
    assert set(server.keys_seen) == {"Bearer from-environment"}


@pytest.mark.parametrize("fault", [refuse(429, {}), refuse(409, {}), refuse(503, b"busy"), refuse(500, {}), drop])
def test_what_another_try_may_cure_is_tried_again(server: FakeServer, fault: Any) -> None:
    server.script = [fault, fault, answer("at last")]
    assert use(server, lambda client: client.complete("x")).text == "at last"
    assert len(server.requests) == 3


def test_retry_after_is_obeyed(server: FakeServer) -> None:
    server.script = [refuse(429, {}, **{"Retry-After": "0.3"})]
    started = time.monotonic()
    assert use(server, lambda client: client.complete("x")).text == "fine"
    assert time.monotonic() - started >= 0.3


def test_a_wait_is_bounded_whatever_the_server_asks_for(server: FakeServer) -> None:
    server.script = [refuse(503, {}, **{"Retry-After": "3600"})]
    started = time.monotonic()
    use(server, lambda client: client.complete("x"), retry=RetryPolicy(longest_wait_s=0.1))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("fault", [silence(0.5), refuse(200, b"<html>"), refuse(200, {"choices": "?"})])
def test_what_is_no_answer_is_asked_again_on_demand(server: FakeServer, fault: Any) -> None:
    server.script = [fault, fault]
    policy = RetryPolicy(first_wait_s=0.01, unanswered=True)
    assert use(server, lambda client: client.complete("x"), retry=policy, timeout_s=0.2).text == "fine"
    assert len(server.requests) == 3


def test_a_list_of_models_is_asked_for_again(server: FakeServer) -> None:
    refusals = [refuse(503, {}), refuse(503, {})]

    def models(handler: Handler) -> None:
        server.models_action = models if refusals else None
        refusals.pop()(handler)

    server.models_action = models
    assert use(server, lambda client: client.preflight()).name == "tiny"


def test_tries_end(server: FakeServer) -> None:
    server.script = [refuse(503, {"error": {"message": "loading"}})] * 9
    with pytest.raises(RequestError, match="answered 503: loading") as caught:
        use(server, lambda client: client.complete("x"), retry=RetryPolicy(attempts=3, first_wait_s=0.01))
    assert caught.value.status == 503
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too long: 9 > 8", "type": "BadRequestError"}}, "answered 400: too long: 9 > 8"),
        ({"message": "old shape"}, "answered 400: old shape"),
        ({"detail": [{"loc": "x"}]}, r'answered 400: \[\{"loc": "x"\}\]'),
        (b"plain words", "answered 400: plain words"),
        (b"", r"answered 400: \(no message\)"),
    ],
)
def test_a_refusal_is_shown_as_the_server_said_it_and_not_repeated(server: FakeServer, body: Any, message: str) -> None:
    server.script = [refuse(400, body)]
    with pytest.raises(RequestError, match=message):
        use(server, lambda client: client.complete("x"))
    assert len(server.requests) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_silent_server_times_out_and_is_not_asked_again(server: FakeServer, streamed: bool) -> None:
    server.script = [stream("a", then=silence(0.6)) if streamed else silence(0.6)]
    on_text = (lambda text: None) if streamed else None
    with pytest.raises(RequestError, match=r"0\.3 s: raise --timeout"):
        use(server, lambda client: client.complete("x", on_text=on_text), timeout_s=0.3)
    assert len(server.requests) == 1


def test_a_server_that_drips_times_out(server: FakeServer) -> None:
    server.default_action = server.models_action = drip(5.0)
    for asked in (VllmClient.models, lambda client: client.complete("x")):
        began = time.monotonic()
        with pytest.raises(RequestError, match=r"0\.3 s: raise --timeout"):
            use(server, asked, timeout_s=0.3, model="tiny")
        assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (drop, "broke the answer off after 2 characters"),
        (event({"error": {"message": "engine died", "code": 500}}), "engine died"),
        (event({"surprise": 1}), "no completion"),
    ],
)
def test_a_stream_that_breaks_is_an_error_and_not_asked_again(server: FakeServer, end: Any, message: str) -> None:
    server.script = [stream("a", "b", then=end)]
    pieces: list[str] = []
    with pytest.raises(RequestError, match=message):
        use(server, lambda client: client.complete("x", on_text=pieces.append))
    assert pieces == ["a", "b"]
    assert len(server.requests) == 1


def test_a_stream_that_breaks_before_its_first_text_is_asked_again(server: FakeServer) -> None:
    server.script = [stream(then=drop), stream("ok")]
    assert use(server, lambda client: client.complete("x", on_text=lambda text: None)).text == "ok"


@pytest.mark.parametrize("body", [b"<html>", {"choices": "?"}, {"error": {"message": "in a 200"}}])
def test_an_answer_of_another_shape_is_an_error(server: FakeServer, body: Any) -> None:
    server.script = [refuse(200, body)]
    with pytest.raises(RequestError, match=r"no completion|no JSON"):
        use(server, lambda client: client.complete("x"))


@pytest.mark.parametrize("rows", [torch.ones(3), torch.tensor([[torch.nan]])])
def test_bad_rows_are_refused_before_anything_is_sent(server: FakeServer, rows: torch.Tensor) -> None:
    with pytest.raises(DatasetError):
        use(server, lambda client: client.complete(rows))
    assert server.requests == []


def test_preflight_takes_the_only_model_and_probes_one_row(server: FakeServer) -> None:
    served = use(server, lambda client: client.preflight(width=8))
    assert (served.name, served.max_model_len) == ("tiny", 4096)
    ((_, body),) = server.requests
    assert rows_of(body["prompt_embeds"]).shape == (1, 8)
    assert body["max_tokens"] == 1


def test_preflight_not_running() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"no server at .* start one with .*--enable-prompt-embeds"):
            use(url, lambda client: client.preflight())


def test_preflight_wrong_model_lists_the_served_ones(server: FakeServer) -> None:
    server.models = ["a", "b"]
    with pytest.raises(ServerError, match="has no model 'c', it serves a, b"):
        use(server, lambda client: client.preflight(), model="c")
    with pytest.raises(ConfigError, match="serves a, b: name one"):
        use(server, lambda client: client.preflight())
    assert use(server, lambda client: client.preflight(), model="b").name == "b"


def test_preflight_wrong_key(server: FakeServer) -> None:
    server.models_action = refuse(401, {"error": "Unauthorized"})
    with pytest.raises(ServerError, match=r"answered 401: Unauthorized .*--api-key"):
        use(server, lambda client: client.preflight())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("You must set `--enable-prompt-embeds` to input `prompt_embeds`.", "restart it with --enable-prompt-embeds"),
        ("`prompt_embeds` hidden_size 8 does not match the model's hidden_size 64.", "the rows are 8 wide, .* 64"),
        ("something else", "answered 400: something else"),
    ],
)
def test_preflight_tells_why_rows_are_refused(server: FakeServer, said: str, message: str) -> None:
    server.script = [refuse(400, {"error": {"message": said}})]
    with pytest.raises(ServerError, match=message):
        use(server, lambda client: client.preflight(width=8))


@pytest.mark.parametrize(("separator", "warnings"), [("\n", 1), ("", 0)])
def test_newlines_between_parts_are_reported_once(
    server: FakeServer, separator: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.part_separator = separator

    async def action(client: VllmClient) -> None:
        alone, mixed = [client.embeds_part(ROWS)], [client.embeds_part(ROWS), {"type": "text", "text": "q"}]
        for content in (alone, mixed, mixed):
            await client.chat([{"role": "user", "content": content}])

    with caplog.at_level(logging.WARNING):
        use(server, action)
    assert len([record for record in caplog.records if "newlines" in record.message]) == warnings
    assert len(server.requests) == 3


def test_requests_run_side_by_side(server: FakeServer) -> None:
    server.script = [silence(0.2)] * 3

    async def action(client: VllmClient) -> list[Completion]:
        await client.preflight()
        return list(await asyncio.gather(*(client.complete(f"prompt {number}") for number in range(8))))

    started = time.monotonic()
    assert [got.text for got in use(server, action)] == ["fine"] * 8
    assert time.monotonic() - started < 1.5
