"""`POST /v1/compress` and `GET /v1/retrieve/{id}`: messages compressed for a caller that sends them itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support import gateway_server, local_gateway
from tests.support.failing import failing
from tests.support.fake_server import FakeServer, rows_of
from tests.support.prompts import CHAT, CODE
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.model.markers import MEMORY_END, MEMORY_START, wrap
from utils.serving.api_error import ApiError
from utils.serving.memories import MemoryStore
from utils.serving.selected_text import TextSelector

COMPRESS = "/v1/compress"
LONG = "".join(f"setting_{number} = {number * 7919}\n" for number in range(40))
QUESTION = {"role": "user", "content": "What is setting_17?"}
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "tool", "tool_call_id": "1", "content": LONG},
    QUESTION,
]
AUTO = {"auto": 40}


def told(client: httpx.Client, messages: Any = MESSAGES, **fields: Any) -> dict[str, Any]:
    asked = {"messages": messages, "model": "tiny", "code_llava": AUTO, **fields}
    return client.post(COMPRESS, json=asked).raise_for_status().json()


def test_long_parts_come_back_as_latents(gateway: httpx.Client, backend: FakeServer, compressor: Compressor) -> None:
    answer = told(gateway)
    system, tool, question = answer["messages"]
    assert (system, question) == (MESSAGES[0], QUESTION)
    start, part, end = tool["content"]
    assert (tool["role"], tool["tool_call_id"]) == ("tool", "1")
    assert (start["text"], end["text"]) == (MEMORY_START, MEMORY_END)
    prompt = compressor.parse_raw(wrap(LONG))
    assert torch.equal(rows_of(part["data"]), compressor.encode_spans(prompt.spans)[0][0])
    # A byte is a token there.
    outside = len(MESSAGES[0]["content"] + QUESTION["content"])
    assert answer["tokens_before"] == len(LONG) + outside
    assert answer["tokens_after"] == prompt.num_latents + 2 + outside
    assert answer["compression_ratio"] == answer["tokens_before"] / answer["tokens_after"] > 1
    assert answer["code_llava"]["mode"] == "latents"
    assert [entry["reason"] for entry in answer["code_llava"]["auto"]][1] is None
    assert backend.requests == []


def test_what_comes_back_is_what_a_chat_sends(gateway: httpx.Client, backend: FakeServer) -> None:
    for options in (AUTO, {**AUTO, "expand": "1/4"}):
        gateway.post(CHAT, json={"messages": MESSAGES, "code_llava": options}).raise_for_status()
        answer = told(gateway, code_llava=options)
        assert answer["messages"] == backend.bodies[-1]["messages"]
        assert answer["code_llava"]["text_rows"] == (0 if options is AUTO else pytest.approx(len(LONG) / 4, rel=0.1))


def test_long_parts_come_back_as_text_and_the_whole_can_be_had(gateway: httpx.Client) -> None:
    options = {**AUTO, "expand_tokens": 60}
    answer = told(gateway, code_llava=options, **{"as": "text"})
    text = answer["messages"][1]["content"]
    assert "setting_17 = 134623\n" in text
    assert "setting_3 " not in text
    (name,) = answer["ccr_hashes"]
    assert f"tokens left out, hash={name}]" in text
    assert answer["tokens_before"] > 2 * answer["tokens_after"] > 0
    assert answer["code_llava"]["mode"] == "text"
    whole = gateway.get(f"/v1/retrieve/{name}").json()
    assert (whole["original_content"], whole["id"]) == (LONG, name)
    # The next turn of the same chat has the same beginning, and keeps nothing twice.
    again = told(
        gateway, [*MESSAGES, {"role": "assistant", "content": "134623"}, QUESTION], code_llava=options, **{"as": "text"}
    )
    assert again["messages"][:2] == answer["messages"][:2]
    assert [memory["id"] for memory in gateway.get("/v1/memories").json()["data"]].count(name) == 1
    assert gateway.delete(f"/v1/memories/{name}").json()["deleted"]
    assert gateway.get(f"/v1/retrieve/{name}").status_code == 404


def test_nothing_is_kept_of_what_stays_whole(gateway: httpx.Client) -> None:
    for fields in ({"code_llava": {**AUTO, "expand": 1}}, {"code_llava": {"auto": False}}, {"messages": MESSAGES[1:2]}):
        answer = told(gateway, **{"messages": MESSAGES, **fields, "as": "text"})
        assert answer["messages"] == fields.get("messages", MESSAGES)
        assert (answer["ccr_hashes"], answer["compression_ratio"]) == ([], 1.0)


def test_memories_and_markers_are_as_in_other_requests(gateway: httpx.Client) -> None:
    name = gateway.post("/v1/memories", json={"text": LONG}).json()["id"]
    messages = [{"role": "user", "content": f"{wrap('@' + name)} {QUESTION['content']}"}]
    answer = told(gateway, messages, **{"as": "text", "code_llava": {"expand_tokens": 60}})
    assert "setting_17 = 134623\n" in answer["messages"][0]["content"]
    assert answer["ccr_hashes"] == [name]
    assert gateway.get(f"/v1/retrieve/{name}").json()["original_content"] == LONG


def test_a_memory_that_no_prompt_can_hold_can_be_selected_from(gateway: httpx.Client) -> None:
    name = gateway.post("/v1/memories", json={"text": LONG * 6}).json()["id"]
    messages = [{"role": "user", "content": f"{wrap('@' + name)} {QUESTION['content']}"}]
    for _ in range(2):
        assert gateway.post(CHAT, json={"messages": messages}).status_code == 413
        answer = told(gateway, messages, **{"as": "text"})
        assert answer["code_llava"]["memory_tokens"] == len(LONG) * 6


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"as": "pictures"}, 400, "this gateway has latents and text"),
        ({"as": ["text"]}, 400, "as is a list of 1"),
        ({"stream": True, "n": 2}, 400, "no 'n', 'stream'"),
        ({"messages": None}, 400, "messages must be a list"),
        ({"messages": [{"role": "user", "content": f"{MEMORY_START}x"}]}, 400, "without a"),
        ({"as": "text", "code_llava": {**AUTO, "expand_policy": "latents", "expand": 0.5}}, 400, "bm25, random, all"),
        ({"as": "text", "code_llava": {**AUTO, "expand_tokens": 0}}, 400, "budget above 0"),
        ({"code_llava": {"tool": "expand"}}, 400, "tool expand"),
        ({"code_llava": {"chunk_size": 7}}, 400, "chunk_size is 7"),
        ({"messages": [{"role": "user", "content": "x" * 513}]}, 413, "512 positions"),
        ({"messages": [{"role": "user", "content": wrap("@mem-" + "0" * 32)}]}, 404, "no memory"),
    ],
)
def test_what_is_refused(gateway: httpx.Client, fields: dict[str, Any], status: int, message: str) -> None:
    got = gateway.post(COMPRESS, json={"messages": MESSAGES, "code_llava": AUTO, **fields})
    assert got.status_code == status
    assert message in got.json()["error"]["message"]


def test_the_door_and_the_header_hold_here_too(gateway: httpx.Client) -> None:
    body = {"messages": MESSAGES, "code_llava": AUTO}
    assert gateway.post(COMPRESS, json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert gateway.post(COMPRESS, json=body, headers={"Content-Type": "text/plain"}).status_code == 415
    assert gateway.get("/v1/retrieve/x", headers={"Host": "evil.example"}).status_code == 403
    assert gateway.get(COMPRESS).status_code == 405
    left = gateway.post(COMPRESS, json={**body, "as": "text"}, headers={"X-Code-Llava-Auto": "off"}).json()
    assert left["messages"] == MESSAGES


def test_originals_are_their_keys(compressor: Compressor, server: FakeServer) -> None:
    with gateway_server.running(compressor, server.url, api_keys=("one", "two")) as url:
        one, two = (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20) for key in ("one", "two")
        )
        with one, two:
            first, second = (told(each, **{"as": "text"})["ccr_hashes"][0] for each in (one, two))
            assert first != second
            unknown = two.get("/v1/retrieve/" + "0" * 24)
            foreign = two.get(f"/v1/retrieve/{first}")
            assert (foreign.status_code, foreign.text.replace(first, "0" * 24)) == (404, unknown.text)
            assert one.get(f"/v1/retrieve/{first}").status_code == 200
        assert httpx.post(url + COMPRESS, json={"messages": MESSAGES}).status_code == 401
        assert httpx.get(f"{url}/v1/retrieve/{first}").status_code == 401


@pytest.fixture(scope="module", params=["local", "text"])
def text_url(request: pytest.FixtureRequest, checkpoints: dict[str, Path], server: FakeServer) -> Iterator[str]:
    running = {
        "local": lambda: local_gateway.running(Compressor.load(checkpoints["lclm"], settings=ON_CPU)),
        "text": lambda: gateway_server.running(TextSelector.load(checkpoints["lclm"]), server.url),
    }
    with running[request.param]() as url:
        yield url


def test_where_no_server_reads_latents_text_is_what_comes(text_url: str) -> None:
    with httpx.Client(base_url=text_url, timeout=20) as client:
        answer = told(client, model=None)
        assert answer["code_llava"]["mode"] == "text"
        assert answer["tokens_before"] > answer["tokens_after"]
        assert client.get(f"/v1/retrieve/{answer['ccr_hashes'][0]}").json()["original_content"] == LONG
        got = client.post(COMPRESS, json={"messages": MESSAGES, "as": "latents"})
        assert (got.status_code, "this gateway has text" in got.text) == (400, True)


def test_text_may_be_longer_than_the_decoders_positions(gateway: httpx.Client) -> None:
    long = LONG * 4
    messages = [{"role": "tool", "content": long}, QUESTION]
    answer = told(gateway, messages, **{"as": "text"})
    assert answer["tokens_before"] == len(long) + len(QUESTION["content"])
    assert gateway.get(f"/v1/retrieve/{answer['ccr_hashes'][0]}").json()["original_content"] == long


def test_the_store_keeps_a_text_once_and_refuses_what_has_no_room() -> None:
    now = [1000.0]
    store = MemoryStore(3, 10, ttl_s=5, clock=lambda: now[0])
    first, second, again = store.keep(["abc", "def", "abc"], "a")
    assert first is again
    assert len(first.id) == 24
    assert {first.id, second.id}.isdisjoint(memory.id for memory in MemoryStore(3, 10).keep(["abc", "def"], "a"))
    assert store.keep(["abc"], "b")[0].id != first.id
    now[0] += 4
    store.keep(["abc"], "a")
    now[0] += 2
    assert [memory.text for memory in store.list("a")] == ["abc"]
    store.keep(["12345678"], "a")
    assert [memory.text for memory in store.list("a")] == ["12345678"]
    for texts in (["1", "2", "3", "4"], ["123456", "78901"]):
        with pytest.raises(ApiError) as refused:
            store.keep(texts, "a")
        assert refused.value.status == 413
    assert [memory.text for memory in store.list("a")] == ["12345678"]


def test_an_encoder_that_fails_is_told(compressor: Compressor, server: FakeServer) -> None:
    for policy, status in (("fail", 500), ("plain-text", 200)):
        with (
            gateway_server.running(failing(compressor), server.url, on_error=policy) as url,
            httpx.Client(base_url=url, timeout=20) as client,
        ):
            got = client.post(
                COMPRESS, json={"messages": [{"role": "tool", "content": CODE}, QUESTION], "code_llava": {"auto": 5}}
            )
            assert got.status_code == status
            if status == 200:
                assert got.json()["code_llava"]["fallback"] == "plain-text"
                assert got.json()["compression_ratio"] == 1.0
