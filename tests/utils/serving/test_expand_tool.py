"""The tool `expand`: what the model is shown and offered, what its calls do, and when the loop ends."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import gateway_server, local_gateway, prompts
from tests.support.fake_server import Action, FakeServer, answer, refuse
from tests.support.prompts import CHAT, CODE, COMPLETIONS
from tests.support.tiny import MAX_POSITIONS, tokenizers
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.select import MemoryText
from utils.model.markers import MEMORY_END, MEMORY_START, wrap
from utils.model.prompt import parse_raw_prompt
from utils.serving.expand_tool import segment_ranges
from utils.serving.selected_text import TextSelector

# Segments of up to 256 bytes, which are tokens here.
LINES = [f"value_{number:03d} = {number * 37:05d}\n" for number in range(36)]
MEMORY = "".join(LINES)
PER_SEGMENT = 256 // len(LINES[0])
SEGMENTS = ["".join(LINES[at : at + PER_SEGMENT]) for at in range(0, len(LINES), PER_SEGMENT)]
IDS = [f"seg_{number}" for number in range(1, len(SEGMENTS) + 1)]
TOOL = {"tool": "expand"}
GREP = {"type": "function", "function": {"name": "grep", "parameters": {"type": "object"}}}

chat_body = functools.partial(prompts.chat_body, model="tiny")


def tool_call(name: str, arguments: str, number: int = 0) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def expand_call(segment: Any, number: int = 0) -> dict[str, Any]:
    return tool_call("expand", json.dumps({"segment_id": segment}), number)


def calling(*calls: Any, content: str | None = None) -> Action:
    """Answer with calls of tools."""
    message = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return refuse(200, {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}]})


def shown(body: dict[str, Any]) -> str:
    """The user's message as text, each run of latents as an L."""
    content = body["messages"][0]["content"]
    return "".join(part["text"] if part["type"] == "text" else "L" for part in content)


def expected(*expanded: str) -> str:
    return "".join(
        f"{name}:\n" + (text if name in expanded else f"{MEMORY_START}L{MEMORY_END}\n")
        for name, text in zip(IDS, SEGMENTS, strict=True)
    )


def ask(gateway: httpx.Client, content: str = f"{wrap(MEMORY)}What is value_020?", **fields: Any) -> dict[str, Any]:
    got = gateway.post(CHAT, json=chat_body(content, code_llava=TOOL, **fields))
    assert got.status_code == 200, got.text
    return dict(got.json())


def test_a_call_puts_the_text_in_the_latents_place(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [calling(expand_call("seg_2", 7), content="Let me look."), answer("740")]
    got = ask(gateway, temperature=0)
    first, second = backend.bodies
    assert [shown(first), shown(second)] == [
        expected() + "What is value_020?",
        expected("seg_2") + "What is value_020?",
    ]
    (tool,) = first["tools"]
    assert (tool["function"]["name"], tool["function"]["strict"]) == ("expand", True)
    assert tool["function"]["parameters"]["required"] == ["segment_id"]
    assert second["tools"] == first["tools"]
    assert first["temperature"] == second["temperature"] == 0
    said, result = second["messages"][1:]
    assert said == {"role": "assistant", "content": "Let me look.", "tool_calls": [expand_call("seg_2", 7)]}
    assert (result["role"], result["tool_call_id"]) == ("tool", "call_7")
    assert got["choices"][0]["message"]["content"] == "740"
    report = got["code_llava"]
    assert report["tool"] == {"rounds": 1, "segments": len(IDS), "expanded": ["seg_2"]}
    (span,) = report["spans"]
    ((chars,),) = (segment["chars"] for segment in span["segments"])
    assert MEMORY[slice(*chars)] == SEGMENTS[1]
    assert span["tokens"] == len(MEMORY)
    assert span["text_rows"] == len(SEGMENTS[1])
    assert span["latents"] == sum(-(-len(text) // 4) for text in SEGMENTS) - -(-len(SEGMENTS[1]) // 4)


def test_an_answer_without_a_call_is_the_answer(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [answer("I know")]
    got = ask(gateway)
    assert len(backend.bodies) == 1
    assert got["choices"][0]["message"]["content"] == "I know"
    assert got["code_llava"]["tool"] == {"rounds": 0, "segments": len(IDS), "expanded": []}


@pytest.mark.parametrize(
    "call",
    [
        expand_call("seg_99"),
        expand_call(2),
        expand_call(None),
        tool_call("expand", "seg_1"),
        tool_call("expand", "[]"),
        tool_call("expand", "{}"),
        {"type": "function", "function": {"name": "expand"}},
    ],
)
def test_a_call_that_names_no_segment_is_told_which_there_are(
    gateway: httpx.Client, backend: FakeServer, call: dict[str, Any]
) -> None:
    backend.script = [calling(call), calling(expand_call("seg_1")), answer("fine")]
    got = ask(gateway)
    result = backend.bodies[1]["messages"][-1]
    assert result["role"] == "tool"
    assert all(name in result["content"] for name in IDS)
    assert shown(backend.bodies[1]).startswith(expected())
    assert got["code_llava"]["tool"] == {"rounds": 2, "segments": len(IDS), "expanded": ["seg_1"]}


def test_a_segment_is_shown_once(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [calling(expand_call("seg_1")), calling(expand_call("seg_1", 1)), answer("fine")]
    got = ask(gateway)
    result = backend.bodies[2]["messages"][-1]["content"]
    assert "seg_1" not in result
    assert IDS[1] in result
    assert got["code_llava"]["tool"]["rounds"] == 2
    assert got["code_llava"]["tool"]["expanded"] == ["seg_1"]


def test_a_model_that_calls_for_ever_has_to_answer(gateway: httpx.Client, backend: FakeServer) -> None:
    def call_while_offered(handler: Any) -> None:
        (calling(expand_call("seg_1")) if handler.asked.get("tools") else answer("at last"))(handler)

    backend.default_action = call_while_offered
    got = ask(gateway, tool_choice="auto")
    assert got["choices"][0]["message"]["content"] == "at last"
    assert got["code_llava"]["tool"]["rounds"] == 5
    assert ["tools" in body for body in backend.bodies] == [True] * 5 + [False]
    assert "tool_choice" not in backend.bodies[-1]


def test_calls_of_a_tool_that_is_not_offered_any_more(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.default_action = calling(expand_call("seg_1"))
    got = gateway.post(CHAT, json=chat_body(wrap(MEMORY), code_llava=TOOL))
    assert got.status_code == 502
    assert "expand" in got.json()["error"]["message"]
    assert len(backend.bodies) == 6
    backend.default_action = calling(expand_call("seg_1"), content="so be it")
    (choice,) = ask(gateway)["choices"]
    assert choice == {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "so be it"}}


def test_the_clients_own_tools(gateway: httpx.Client, backend: FakeServer) -> None:
    grep = tool_call("grep", "{}", 3)
    backend.script = [calling(grep)]
    got = ask(gateway, tools=[GREP])
    assert [tool["function"]["name"] for tool in backend.bodies[0]["tools"]] == ["grep", "expand"]
    assert got["choices"][0]["message"]["tool_calls"] == [grep]
    assert got["choices"][0]["finish_reason"] == "tool_calls"
    # Beside a call of the gateway's tool: the model reads the text first.
    backend.script = [calling(expand_call("seg_1"), grep), calling(grep)]
    got = ask(gateway, tools=[GREP])
    assert backend.bodies[2]["messages"][1]["tool_calls"] == [expand_call("seg_1")]
    assert got["choices"][0]["message"]["tool_calls"] == [grep]
    assert got["code_llava"]["tool"]["expanded"] == ["seg_1"]
    backend.default_action = calling(expand_call("seg_1"), grep)
    assert ask(gateway, tools=[GREP])["choices"][0]["message"]["tool_calls"] == [grep]
    assert backend.bodies[-1]["tools"] == [GREP]


def test_several_calls_are_one_round_and_what_does_not_fit_stays(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [calling(*(expand_call(name, number) for number, name in enumerate(IDS))), answer("fine")]
    got = ask(gateway)
    told = got["code_llava"]["tool"]
    results = [message["content"] for message in backend.bodies[1]["messages"] if message["role"] == "tool"]
    assert told["expanded"] == [name for name, result in zip(IDS, results, strict=True) if "no room" not in result]
    assert 0 < len(told["expanded"]) < len(IDS)
    assert told["rounds"] == 1
    (span,) = got["code_llava"]["spans"]
    assert span["tokens"] - span["gain"] <= MAX_POSITIONS
    assert shown(backend.bodies[1]).startswith(expected(*told["expanded"]))


def test_a_segment_with_control_tokens_stays_latents(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [calling(expand_call("seg_1")), answer("fine")]
    got = ask(gateway, content=wrap(f"{CODE}<|im_end|>\n") + "?")
    assert got["code_llava"]["tool"]["expanded"] == []
    assert CODE not in shown(backend.bodies[1])


def test_several_spans_and_a_budget_beside_the_tool(gateway: httpx.Client, backend: FakeServer) -> None:
    backend.script = [calling(expand_call("seg_2")), answer("fine")]
    content = f"{wrap(CODE)} and {wrap('x = 1')} What is width?"
    body = chat_body(content, code_llava={**TOOL, "expand_tokens": 30})
    report = gateway.post(CHAT, json=body).json()["code_llava"]
    first, second = (shown(body) for body in backend.bodies)
    assert "    return width" in first
    assert second.endswith("and seg_2:\nx = 1\n What is width?")
    assert [span["latents"] > 0 for span in report["spans"]] == [True, False]
    assert [span["text_rows"] for span in report["spans"]] == [26, 5]


def test_the_memory_is_encoded_once(gateway: httpx.Client, backend: FakeServer) -> None:
    content = wrap(MEMORY.replace("value", "other")) + "?"
    backend.script = [calling(expand_call("seg_1")), answer("fine"), answer("fine")]
    first, second = (ask(gateway, content=content)["code_llava"] for _ in range(2))
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == second["memory_tokens"]
    latents = [
        [part["data"] for part in body["messages"][0]["content"] if part["type"] == "prompt_embeds"]
        for body in backend.bodies
    ]
    assert latents[0] == latents[2]
    assert latents[1] == latents[0][1:]


def test_errors_of_the_backend_come_through(gateway: httpx.Client, backend: FakeServer) -> None:
    said = {"error": {"message": "too long"}}
    backend.script = [calling(expand_call("seg_1")), refuse(400, said), refuse(200, b"no JSON")]
    got = gateway.post(CHAT, json=chat_body(wrap(MEMORY), code_llava=TOOL))
    assert (got.status_code, got.json()) == (400, said)
    assert gateway.post(CHAT, json=chat_body(wrap(MEMORY), code_llava=TOOL)).status_code == 502


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (COMPLETIONS, {}, "needs a chat"),
        (CHAT, {"stream": True}, "cannot stream"),
        (CHAT, {"n": 2}, "leave n out"),
        (CHAT, {"tools": "x"}, "tools must be a list"),
        (CHAT, {"tools": [GREP, {"type": "function", "function": {"name": "expand"}}]}, "another name"),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "expand"}}}, "another name"),
        (CHAT, {"code_llava": {"tool": "search"}}, "tool is 'search'"),
        (CHAT, {"code_llava": {"tool": True}}, "tool is True"),
        (CHAT, {"code_llava": {"tool": []}}, "tool is a list"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(
    gateway: httpx.Client, backend: FakeServer, path: str, fields: dict[str, Any], message: str
) -> None:
    body = chat_body(wrap(CODE)) if path == CHAT else {"prompt": wrap(CODE)}
    got = gateway.post(path, json={**body, "code_llava": TOOL, **fields})
    assert got.status_code == 400
    assert message in got.json()["error"]["message"]
    assert backend.requests == []


def test_other_backends_have_no_tool(checkpoints: dict[str, Path], backend: FakeServer) -> None:
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    text = gateway_server.running(TextSelector.load(checkpoints["lclm"]), backend.url)
    for running in (local_gateway.running(compressor), text):
        with running as url:
            got = httpx.post(url + CHAT, json=chat_body(wrap(CODE), code_llava=TOOL))
        assert got.status_code == 400
        assert "vLLM" in got.json()["error"]["message"]


def test_segments_are_runs_of_whole_lines() -> None:
    text = "\n".join(["x" * 300, "", "y = 'é\U0001f642'", *(f"z{n}" for n in range(200)), "no line end"])
    prompt = parse_raw_prompt(wrap(text), tokenizers(), 4)
    memory = MemoryText.of(prompt.spans[0], tokenizers().encoder)
    ranges = segment_ranges(memory)
    assert "".join(text[begin:end] for begin, end in ranges) == text
    sizes = [len(text[begin:end].encode()) for begin, end in ranges]
    assert all(190 < size <= 256 for size in sizes[:-1])
    # Only the first line is longer than a segment.
    assert [text[end - 1] for _, end in ranges[:-1]] == ["x"] + ["\n"] * (len(ranges) - 2)
