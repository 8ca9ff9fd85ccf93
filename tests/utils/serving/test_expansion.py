"""Requests in which a part of the memory stays text: what the backend reads, what the answer tells, what is refused."""

from __future__ import annotations

import functools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support import gateway_server, local_gateway, prompts
from tests.support.failing import failing
from tests.support.fake_server import FakeServer, rows_of
from tests.support.prompts import CHAT, CODE, COMPLETIONS
from tests.support.rows_read import rows_read
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.expander import Expander
from utils.compress.select import Expansion
from utils.inference.inference import load_model
from utils.model.markers import MEMORY_END, MEMORY_START, wrap
from utils.model.prompt import MemoryLimit

COLOURS = "".join(f"{name}_code = {number}  # é\n" for number, name in enumerate(("red", "green", "blue", "grey")))
QUESTION = "What is green_code?"
TEXT = f"{wrap(COLOURS)} {wrap(CODE)} {QUESTION}"
BUDGET = {"expand_tokens": 30}

chat_body = functools.partial(prompts.chat_body, model="tiny")


def expected_rows(compressor: Compressor, text: str, expansion: Expansion | None, chat: bool) -> torch.Tensor:
    """The rows of the local prompt."""
    parse = compressor.parse_chat if chat else compressor.parse_raw
    prompt: Any = [{"role": "user", "content": text}] if chat else text
    expanded = compressor.expand(parse(prompt), expansion)
    return compressor.embed(expanded, compressor.encode_spans(expanded.spans)).values_TD


@pytest.mark.parametrize(
    ("fields", "expansion"),
    [
        ({"expand_tokens": 30}, Expansion(tokens=30)),
        ({"expand": "1/4"}, Expansion(share=Fraction(1, 4))),
        ({"expand": 0.5}, Expansion(share=Fraction(1, 2))),
        ({"expand_tokens": 30, "expand_query": "width?"}, Expansion(tokens=30, query="width?")),
        ({"expand_tokens": 60, "expand_policy": "latents"}, Expansion(tokens=60, policy="latents")),
        ({"expand_tokens": 60, "expand_policy": "random"}, Expansion(tokens=60, policy="random")),
        ({"expand_policy": "all"}, Expansion(policy="all")),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_the_backend_reads_the_local_prompt(
    gateway: httpx.Client, backend: FakeServer, compressor: Compressor, chat: bool, fields: Any, expansion: Expansion
) -> None:
    body = chat_body(TEXT) if chat else {"model": "tiny", "prompt": TEXT}
    got = gateway.post(CHAT if chat else COMPLETIONS, json={**body, "code_llava": fields})
    assert got.status_code == 200, got.text
    expected = expected_rows(compressor, TEXT, expansion, chat)
    assert len(expected) != len(expected_rows(compressor, TEXT, None, chat))
    assert torch.equal(rows_read(backend.bodies[-1], compressor), expected)


def test_text_stands_between_the_latents_of_the_rest(gateway: httpx.Client, backend: FakeServer) -> None:
    got = gateway.post(CHAT, json=chat_body(f"{wrap(COLOURS)} {QUESTION}", code_llava=BUDGET)).json()
    before, first, text, rest, after = backend.bodies[-1]["messages"][0]["content"]
    assert (before["text"], after["text"]) == (MEMORY_START, f"{MEMORY_END} {QUESTION}")
    assert text["text"] == "green_code = 1  # é\n"
    (span,) = got["code_llava"]["spans"]
    assert span["latents"] == len(rows_of(first["data"])) + len(rows_of(rest["data"]))
    (segment,) = span["segments"]
    ((begin, end),) = segment["chars"]
    assert COLOURS[begin:end] == text["text"]
    assert segment["rows"] == span["text_rows"] == len(text["text"].encode())
    assert span["gain"] == span["tokens"] - span["latents"] - span["text_rows"] - 2


def test_a_line_that_vllm_refuses_as_text_goes_as_rows(
    gateway: httpx.Client, backend: FakeServer, compressor: Compressor
) -> None:
    text = f"{wrap(COLOURS + 'pink = <prompt_embeds>')} What is pink?"
    gateway.post(CHAT, json=chat_body(text, code_llava={"expand_tokens": 22})).raise_for_status()
    expected = expected_rows(compressor, text, Expansion(tokens=22), chat=True)
    content = backend.bodies[-1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "prompt_embeds", "prompt_embeds", "text"]
    assert torch.equal(rows_read(backend.bodies[-1], compressor), expected)
    assert "<prompt_embeds>" not in "".join(part.get("text", "") for part in content)


@pytest.mark.parametrize("fields", [{}, {"expand_tokens": 0}, {"expand": 0}, {"expand_policy": "none"}])
@pytest.mark.parametrize("chat", [True, False])
def test_without_a_budget_requests_go_out_as_ever(
    gateway: httpx.Client, backend: FakeServer, compressor: Compressor, chat: bool, fields: Any
) -> None:
    sent: list[bytes] = []

    def keep(handler: Any) -> None:
        sent.append(handler.body)
        handler.reply(200, {"choices": []})

    body = chat_body(TEXT) if chat else {"model": "tiny", "prompt": TEXT}
    path = CHAT if chat else COMPLETIONS
    backend.script = [keep, keep]
    gateway.post(path, json=body).raise_for_status()
    got = gateway.post(path, json={**body, "code_llava": fields})
    assert got.json()["code_llava"]["text_rows"] == 0
    assert got.headers["x-code-llava-text-rows"] == "0"
    assert sent[0] == sent[1]
    assert torch.equal(rows_read(json.loads(sent[1]), compressor), expected_rows(compressor, TEXT, None, chat))


def test_another_question_about_the_same_memory_encodes_nothing(gateway: httpx.Client, backend: FakeServer) -> None:
    memory = wrap("".join(f"{name} = {number}\n" for number, name in enumerate(("cyan", "pink", "brown"))))
    asked = []
    for question in ("What is cyan?", "What is brown?"):
        got = gateway.post(CHAT, json=chat_body(f"{memory} {question}", code_llava={"expand_tokens": 12}))
        asked.append(got.json()["code_llava"])
    assert [report["cached_tokens"] for report in asked] == [0, asked[1]["memory_tokens"]]
    chars = [report["spans"][0]["segments"][0]["chars"] for report in asked]
    assert chars[0] != chars[1]


def test_headers_and_counters(gateway: httpx.Client) -> None:
    names = ("code_llava_text_rows_total", "code_llava_expanded_requests_total", "code_llava_latents_total")

    def counts() -> list[float]:
        shown = dict(line.rsplit(" ", 1) for line in gateway.get("/metrics").text.splitlines())
        return [float(shown[name]) for name in names]

    before = counts()
    got = gateway.post(CHAT, json=chat_body(TEXT, stream=True, code_llava=BUDGET))
    plain = gateway.post(CHAT, json=chat_body(TEXT, code_llava=BUDGET)).json()["code_llava"]
    rows, latents = plain["text_rows"], plain["latents"]
    assert counts() == [before[0] + 2 * rows, before[1] + 2, before[2] + 2 * latents]
    assert plain["compression_ratio"] == plain["memory_tokens"] / (rows + latents)
    assert int(got.headers["x-code-llava-text-rows"]) == rows
    assert int(got.headers["x-code-llava-latents"]) == latents
    spans = json.loads(got.headers["x-code-llava-spans"])
    chars = json.loads(got.headers["x-code-llava-text-chars"])
    assert [span["text_rows"] for span in spans] == [span["text_rows"] for span in plain["spans"]]
    assert chars == [[pair for segment in span["segments"] for pair in segment["chars"]] for span in plain["spans"]]


def test_a_span_too_small_to_gain_anything_says_so(gateway: httpx.Client) -> None:
    (small,) = gateway.post(CHAT, json=chat_body(wrap("x"))).json()["code_llava"]["spans"]
    (large,) = gateway.post(CHAT, json=chat_body(wrap(CODE))).json()["code_llava"]["spans"]
    (text,) = gateway.post(CHAT, json=chat_body(wrap(CODE), code_llava={"expand_policy": "all"})).json()["code_llava"][
        "spans"
    ]
    assert small["gain"] < 0 < large["gain"]
    assert (text["latents"], text["gain"]) == (0, -2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand_tokens": -1}, "expand_tokens is -1"),
        ({"expand_tokens": 1.5}, "expand_tokens is 1.5"),
        ({"expand_tokens": True}, "expand_tokens is True"),
        ({"expand_tokens": "256"}, "expand_tokens is '256'"),
        ({"expand": "2"}, "1/16"),
        ({"expand": -0.1}, "1/16"),
        ({"expand": "1/0"}, "1/16"),
        ({"expand": "1e-9999999"}, "1/16"),
        ({"expand": True}, "1/16"),
        ({"expand": [1]}, "a list of 1"),
        ({"expand": "1/4", "expand_tokens": 3}, "expected one of them"),
        ({"expand_policy": "answer"}, "'answer', expected one of bm25"),
        ({"expand_policy": {}}, "expand_policy is an object"),
        ({"expand_policy": "bm25"}, "needs a budget"),
        ({"expand_query": "x"}, "needs a budget"),
        ({"expand_query": " ", "expand_tokens": 3}, "expand_query is ' '"),
        ({"expand_query": 3, "expand_tokens": 3}, "expand_query is 3"),
        ({"expand_token": 3}, "the field 'expand_token', expected any of chunk_size, expand_tokens"),
    ],
)
def test_bad_values_are_named(gateway: httpx.Client, backend: FakeServer, fields: Any, message: str) -> None:
    for content in (TEXT, "no memory"):
        got = gateway.post(CHAT, json=chat_body(content, code_llava=fields))
        assert got.status_code == 400
        assert message in got.json()["error"]["message"]
    assert backend.requests == []


def test_a_prompt_that_asks_nothing(gateway: httpx.Client, backend: FakeServer, compressor: Compressor) -> None:
    for policy in ("bm25", "latents"):
        fields = {**BUDGET, "expand_policy": policy}
        got = gateway.post(CHAT, json=chat_body(wrap(COLOURS), code_llava=fields))
        assert (got.status_code, "expand_query" in got.json()["error"]["message"]) == (400, True)
        asked = gateway.post(CHAT, json=chat_body(wrap(COLOURS), code_llava={**fields, "expand_query": QUESTION}))
        assert asked.json()["code_llava"]["text_rows"] > 0
    # Where the budget is only the gateway's default, it is no error.
    with (
        gateway_server.running(compressor, backend.url, expansion=Expansion(tokens=30)) as url,
        httpx.Client(base_url=url) as client,
    ):
        assert client.post(CHAT, json=chat_body(wrap(COLOURS))).json()["code_llava"]["text_rows"] == 0


def test_the_gateways_default(compressor: Compressor, backend: FakeServer) -> None:
    default = Expansion(tokens=30, policy="random", query=QUESTION)
    with (
        gateway_server.running(compressor, backend.url, expansion=default) as url,
        httpx.Client(base_url=url) as gateway,
    ):
        for fields, expansion in (
            ({}, default),
            ({"code_llava": {"chunk_size": 4}}, default),
            ({"code_llava": {"expand_tokens": 0}}, None),
            ({"code_llava": {"expand_policy": "bm25", "expand_query": "width?"}}, Expansion(tokens=30, query="width?")),
            ({"code_llava": {"expand": 1}}, Expansion(share=Fraction(1), policy="random", query=QUESTION)),
        ):
            gateway.post(CHAT, json=chat_body(TEXT, **fields)).raise_for_status()
            expected = expected_rows(compressor, TEXT, expansion, chat=True)
            assert torch.equal(rows_read(backend.bodies[-1], compressor), expected)
        told = gateway.get("/v1/compression").json()
    assert told["expand_default"] == {"expand_policy": "random", "expand_tokens": 30, "expand": None}
    assert "answer" not in told["expand_policies"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"expand": "1/8"}, {"expand": "1/2", "expand_policy": "random"}])
def test_tokens_are_the_local_prompts_with_a_real_tokenizer(
    default_compressor: Compressor, backend: FakeServer, fields: dict[str, str]
) -> None:
    memory = Path(__file__).read_text(encoding="utf-8")[:6000]
    text = f"{wrap(memory)}\nWhat does expected_rows return?"
    expansion = Expansion(share=Fraction(fields["expand"]), policy=fields.get("expand_policy", "bm25"))
    with gateway_server.running(default_compressor, backend.url) as url:
        got = httpx.post(url + CHAT, json=chat_body(text, code_llava=fields), timeout=120)
    assert len(got.json()["code_llava"]["spans"][0]["segments"]) > 1
    assert torch.equal(
        rows_read(backend.bodies[-1], default_compressor), expected_rows(default_compressor, text, expansion, chat=True)
    )


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_text_that_does_not_fit_is_refused_unencoded(gateway: httpx.Client, backend: FakeServer, path: str) -> None:
    long = wrap(f"{COLOURS}\n" * 12)
    body = chat_body(f"{long} {QUESTION}") if path == CHAT else {"prompt": f"{long} {QUESTION}"}
    assert gateway.post(path, json=body).status_code == 200
    got = gateway.post(path, json={**body, "code_llava": {"expand": 1}})
    assert got.status_code == 413
    assert "512" in got.json()["error"]["message"]
    assert len(backend.requests) == 1


@pytest.mark.parametrize("policy", ["bm25", "latents"])
def test_each_prompt_of_a_completion_has_the_budget(
    gateway: httpx.Client, backend: FakeServer, compressor: Compressor, policy: str
) -> None:
    texts = [TEXT, "plain", f"{wrap(CODE)} {wrap(COLOURS)} Where is width?", "."]
    fields = {**BUDGET, "expand_policy": policy}
    got = gateway.post(COMPLETIONS, json={"prompt": texts, "code_llava": fields})
    assert got.status_code == 200, got.text
    expansion = Expansion(tokens=30, policy=policy)
    for blob, text in zip(backend.bodies[-1]["prompt_embeds"], texts, strict=True):
        assert torch.equal(rows_of(blob), expected_rows(compressor, text, expansion, chat=False))
    assert len(got.json()["code_llava"]["spans"]) == 4
    assert gateway.post(COMPLETIONS, json={"prompt": [TEXT, " "], "code_llava": fields}).status_code == 200


@pytest.mark.parametrize("policy", ["bm25", "latents"])
def test_the_local_decoder_answers_the_expanded_prompt(checkpoints: dict[str, Path], policy: str) -> None:
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu")
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    expander = Expander(processor.tokenizers, lambda spans: [latents for latents, _ in compressor.encode_spans(spans)])
    expansion = Expansion(tokens=60, policy=policy)
    with local_gateway.running(compressor) as url:
        for path, body, prompt in (
            (CHAT, chat_body(TEXT), processor.parse_chat([{"role": "user", "content": TEXT}])),
            (COMPLETIONS, {"prompt": TEXT}, processor.parse_raw(TEXT)),
        ):
            fields = {"model": "lclm", "max_tokens": 12, "temperature": 0}
            fields["code_llava"] = {"expand_tokens": 60, "expand_policy": policy}
            got = httpx.post(url + path, json={**body, **fields}, timeout=60).json()
            (ids,) = model.generate([expander(prompt, expansion)], max_new_tokens=12)
            (choice,) = got["choices"]
            said = choice["message"]["content"] if path == CHAT else choice["text"]
            assert said == tokenizer.decode(ids, skip_special_tokens=True)
            assert got["usage"]["prompt_tokens"] == len(expander(prompt, expansion).input_ids)
            assert got["code_llava"]["text_rows"] > 0


@pytest.mark.parametrize("fields", [BUDGET, {**BUDGET, "expand_policy": "latents"}, {"tool": "expand"}])
def test_the_memory_goes_as_plain_text_where_the_encoder_fails(
    compressor: Compressor, backend: FakeServer, fields: dict[str, Any]
) -> None:
    body = chat_body(TEXT, code_llava=fields)
    with gateway_server.running(failing(compressor), backend.url, on_error="plain-text") as url:
        got = httpx.post(url + CHAT, json=body).json()
    plain = f"{COLOURS} {CODE} {QUESTION}"
    assert backend.bodies == [chat_body([{"type": "text", "text": plain}])]
    assert got["code_llava"]["fallback"] == "plain-text"
    assert got["code_llava"]["text_rows"] == 0


def test_what_the_limit_on_a_span_cuts_off_is_not_shown(checkpoints: dict[str, Path], backend: FakeServer) -> None:
    limit = MemoryLimit(max_tokens=len(COLOURS.encode()), truncate=True)
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, limit=limit)
    with gateway_server.running(compressor, backend.url) as url:
        for tail in ("", "green_code = 'beyond the limit'\n" * 1000):
            fields = {"expand_tokens": 24, "expand_query": "green_code beyond"}
            got = httpx.post(url + CHAT, json=chat_body(wrap(COLOURS + tail), code_llava=fields)).json()
            _, _, text, _, _ = backend.bodies[-1]["messages"][0]["content"]
            assert text["text"] == "green_code = 1  # é\n"
            assert got["code_llava"]["memory_tokens"] == len(COLOURS.encode())
