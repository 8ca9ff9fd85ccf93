"""The gateway in front of a server that reads text only: selected text in place of memory, and nothing of latents."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save_file

from tests.support import gateway_server, prompts
from tests.support.fake_server import FakeServer, drop, refuse, stream
from tests.support.prompts import CHAT, CODE, COMPLETIONS
from utils.compress.compressor import Compressor
from utils.compress.select import Expansion
from utils.errors import CheckpointError, ConfigError
from utils.model.markers import MEMORY_END, MEMORY_START, wrap
from utils.model.prompt import MemoryLimit
from utils.serving import gateway as command
from utils.serving.selected_text import TextSelector

LINES = [f"{name}_setting = {number}  # é\n" for number, name in enumerate(("red", "green", "blue", "grey", "black"))]
MEMORY = "".join(LINES)
QUESTION = "What is blue?"
TEXT = f"{wrap(MEMORY)} {QUESTION}"
# A byte is a token here.
BUDGET = {"expand_tokens": 30}


def left_out(text: str, line_end: str = "\n") -> str:
    return f"[… {len(text.encode())} tokens left out …]{line_end}"


SHORT = left_out(LINES[0] + LINES[1]) + LINES[2] + left_out(LINES[3] + LINES[4])

chat_body = functools.partial(prompts.chat_body, model="tiny")


@pytest.fixture(scope="module")
def selector(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TextSelector:
    folder = shutil.copytree(checkpoints["lclm"], tmp_path_factory.mktemp("copy") / "no weights")
    for weights in folder.glob("*coder/*.safetensors"):
        save_file({}, weights)
    with pytest.raises(CheckpointError):
        Compressor.load(folder)
    return TextSelector.load(folder)


@pytest.fixture(scope="module")
def url(selector: TextSelector, server: FakeServer) -> Iterator[str]:
    with gateway_server.running(selector, server.url) as address:
        yield address


def test_the_backend_reads_the_selected_text(gateway: httpx.Client, backend: FakeServer) -> None:
    got = gateway.post(CHAT, json=chat_body(TEXT, temperature=0.3, code_llava=BUDGET))
    (body,) = backend.bodies
    assert body == chat_body(f"{SHORT} {QUESTION}", temperature=0.3)
    answered = got.json()
    assert answered["choices"][0]["message"]["content"] == "fine"
    report = answered["code_llava"]
    assert (report["mode"], report["latents"], report["memory_tokens"]) == ("text", 0, len(MEMORY.encode()))
    assert report["text_rows"] == len(SHORT.encode())
    (span,) = report["spans"]
    begin = len(LINES[0] + LINES[1])
    segment = {"chars": [[begin, begin + len(LINES[2])]], "rows": len(LINES[2].encode())}
    assert span["segments"] == [segment]
    assert span["gain"] == span["tokens"] - span["text_rows"]
    assert got.headers["x-code-llava-mode"] == "text"
    assert got.headers["x-code-llava-text-rows"] == str(report["text_rows"])
    assert json.loads(got.headers["x-code-llava-text-chars"]) == [segment["chars"]]


def test_contents_keep_their_kind(gateway: httpx.Client, backend: FakeServer) -> None:
    image = {"type": "image_url", "image_url": {"url": "…"}}
    parts = [{"type": "text", "text": wrap(MEMORY)}, image, {"type": "text", "text": QUESTION}]
    gateway.post(CHAT, json=chat_body(parts, code_llava=BUDGET)).raise_for_status()
    assert backend.bodies[-1]["messages"][0]["content"] == [{"type": "text", "text": SHORT}, *parts[1:]]
    gateway.post(COMPLETIONS, json={"prompt": [TEXT, "plain"], "code_llava": BUDGET}).raise_for_status()
    assert backend.bodies[-1] == {"prompt": [f"{SHORT} {QUESTION}", "plain"]}
    gateway.post(COMPLETIONS, json={"prompt": TEXT, "code_llava": BUDGET}).raise_for_status()
    assert backend.bodies[-1] == {"prompt": f"{SHORT} {QUESTION}"}


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (TEXT, {"expand": 1}),
        (TEXT, {"expand_policy": "all"}),
        (TEXT, {"expand_tokens": 10_000}),
        (wrap(MEMORY), BUDGET),
        (wrap("x"), BUDGET),
    ],
)
def test_all_of_the_memory(gateway: httpx.Client, backend: FakeServer, content: str, fields: Any) -> None:
    got = gateway.post(CHAT, json=chat_body(content, code_llava=fields)).json()["code_llava"]
    (body,) = backend.bodies
    assert body["messages"][0]["content"] == content.replace(MEMORY_START, "").replace(MEMORY_END, "")
    (span,) = got["spans"]
    assert span["text_rows"] == span["tokens"]
    assert span["gain"] == 0


def test_stretches_that_a_note_would_not_shorten_stay(gateway: httpx.Client, backend: FakeServer) -> None:
    memory = f"blue = 1\nx = 2\n{MEMORY}blue = 3\ny"
    fields = {"expand_tokens": 18, "expand_query": "blue"}
    gateway.post(CHAT, json=chat_body(wrap(memory), code_llava=fields)).raise_for_status()
    expected = f"blue = 1\nx = 2\n{MEMORY}blue = 3\ny"
    left = backend.bodies[-1]["messages"][0]["content"]
    assert left.startswith("blue = 1\n[… ")
    assert left.endswith(" left out …]\nblue = 3\ny")
    assert len(left) < len(expected)


def test_no_line_fits_the_budget(gateway: httpx.Client, backend: FakeServer) -> None:
    body = chat_body(f"{wrap(MEMORY.strip())} Why?", code_llava={"expand_tokens": 3})
    got = gateway.post(CHAT, json=body).json()["code_llava"]
    assert backend.bodies[-1]["messages"][0]["content"] == left_out(MEMORY.strip(), line_end="") + " Why?"
    assert got["spans"][0]["segments"] == []


def test_the_default_is_an_eighth_or_what_the_gateway_was_told(
    gateway: httpx.Client, backend: FakeServer, selector: TextSelector
) -> None:
    long = "".join(f"value_{number} = {number}\n" for number in range(100))
    body = chat_body(f"{wrap(long)} What is value?", code_llava={})
    assert gateway.get("/v1/compression").json()["expand_default"]["expand"] == 1 / 8

    def kept(client: httpx.Client) -> float:
        (span,) = client.post(CHAT, json=body).json()["code_llava"]["spans"]
        return sum(segment["rows"] for segment in span["segments"]) / span["tokens"]

    assert 1 / 9 < kept(gateway) <= 1 / 8
    settings = {"expansion": Expansion(share=Fraction(1, 2), policy="random")}
    with gateway_server.running(selector, backend.url, **settings) as url, httpx.Client(base_url=url) as other:
        assert 0.4 < kept(other) <= 0.6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand_tokens": 0}, "the budget is 0"),
        ({"expand_policy": "latents"}, "expected one of bm25, random, all"),
        ({"expand_policy": "none"}, "expected one of bm25, random, all"),
        ({"chunk_size": 4}, "chunk_size is 4"),
    ],
)
def test_what_needs_latents_is_refused(gateway: httpx.Client, backend: FakeServer, fields: Any, message: str) -> None:
    got = gateway.post(CHAT, json=chat_body(TEXT, code_llava=fields))
    assert got.status_code == 400
    assert message in got.json()["error"]["message"]
    assert backend.requests == []


def test_everything_else_is_as_with_other_backends(
    gateway: httpx.Client, backend: FakeServer, selector: TextSelector
) -> None:
    plain = chat_body("hello", seed=3)
    gateway.post(CHAT, json=plain).raise_for_status()
    assert backend.bodies[-1] == plain
    stored = gateway.post("/v1/memories", json={"text": MEMORY}).json()["id"]
    gateway.post(CHAT, json=chat_body(f"{wrap('@' + stored)} {QUESTION}", code_llava=BUDGET)).raise_for_status()
    assert backend.bodies[-1]["messages"][0]["content"] == f"{SHORT} {QUESTION}"
    backend.script = [stream("one ", "two"), refuse(400, {"error": {"message": "too long"}}), drop]
    streamed = gateway.post(CHAT, json=chat_body(TEXT, stream=True, code_llava=BUDGET))
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert streamed.headers["x-code-llava-mode"] == "text"
    assert gateway.post(CHAT, json=chat_body(TEXT)).json() == {"error": {"message": "too long"}}
    assert gateway.post(CHAT, json=chat_body(TEXT)).status_code == 502
    assert gateway.post(CHAT, json=chat_body("<|memory_start|>")).status_code == 400
    assert gateway.post(CHAT, json=chat_body([{"type": "prompt_embeds", "data": "x"}])).status_code == 400
    assert "code_llava_text_rows_total" in gateway.get("/metrics").text
    # What only vLLM knows is not sent.
    with gateway_server.running(selector, backend.url, api_keys=("front",)) as url:
        headers = {"Authorization": "Bearer front"}
        httpx.post(url + CHAT, json=chat_body(TEXT, code_llava=BUDGET), headers=headers).raise_for_status()
    assert backend.bodies[-1].keys() == {"model", "messages"}


@pytest.mark.slow
def test_a_memory_beyond_all_limits_is_refused(selector: TextSelector, backend: FakeServer) -> None:
    with gateway_server.running(selector, backend.url) as url:
        got = httpx.post(url + CHAT, json=chat_body(wrap("x" * ((1 << 20) + 1))), timeout=60)
    assert got.status_code == 413
    assert str(1 << 20) in got.json()["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chunk-size", "4"], "--chunk-size"),
        (["--truncate-memory", "--max-memory-tokens", "5"], "--truncate-memory"),
        (["--expand-tokens", "0"], "budget above 0"),
        (["--expand", "1/4", "--expand-policy", "latents"], "bm25, random, all"),
    ],
)
def test_flags_that_need_latents_are_refused(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert command.main(["--backend", "text", "--checkpoint", str(checkpoints["lclm"]), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_limit_that_truncates_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="truncate"):
        TextSelector.load(checkpoints["lclm"], MemoryLimit(max_tokens=3, truncate=True))


def test_code_keeps_its_lines(gateway: httpx.Client, backend: FakeServer) -> None:
    fields = {"expand": 0.6, "expand_query": "return"}
    gateway.post(CHAT, json=chat_body(wrap(CODE), code_llava=fields)).raise_for_status()
    first, second = CODE.splitlines(keepends=True)
    assert backend.bodies[-1]["messages"][0]["content"] == left_out(first) + second
