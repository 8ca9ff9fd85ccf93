"""Messages with markers become content parts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("orjson")

from utils.errors import PromptError
from utils.model.markers import MEMORY, MEMORY_END, MEMORY_START, wrap
from utils.serving.chat_parts import between_markers, outline_chat

LATENTS = {"type": "prompt_embeds", "data": "…"}


MEMORY_OF_LATENTS = between_markers([LATENTS])


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def fill(content: Any, *span_parts: list[dict[str, Any]]) -> Any:
    return outline_chat([{"role": "user", "content": content}]).fill(span_parts)[0]["content"]


def test_latents_stand_between_the_markers() -> None:
    assert fill(f"a {wrap('x')} b {wrap('y')}", MEMORY_OF_LATENTS, MEMORY_OF_LATENTS) == [
        text(f"a {MEMORY_START}"), LATENTS, text(f"{MEMORY_END} b {MEMORY_START}"), LATENTS, text(MEMORY_END),
    ]  # fmt: skip


def test_text_parts_and_foreign_parts_keep_their_places() -> None:
    image = {"type": "image_url", "image_url": {"url": "…"}}
    assert fill([text("a"), image, text(wrap("x"))], MEMORY_OF_LATENTS) == [
        text("a"), image, text(MEMORY_START), LATENTS, text(MEMORY_END),
    ]  # fmt: skip


@given(texts=st.lists(st.text(st.characters(exclude_characters="<|>")), min_size=3, max_size=3))
def test_plain_text_in_place_of_latents_is_the_message_without_markers(texts: list[str]) -> None:
    before, memory, after = texts[0], texts[1] or "x", texts[2]
    assert fill(before + wrap(memory) + after, [text(memory)]) == [text(before + memory + after)]


def test_texts_between_runs_of_latents_keep_their_places() -> None:
    parts = between_markers([text("one\n"), LATENTS, text("two\n")])
    assert fill(f"a {wrap('x')} b", parts) == [
        text(f"a {MEMORY_START}one\n"), LATENTS, text(f"two\n{MEMORY_END} b"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("last", "query"),
    [
        ({"role": "user", "content": f"a {wrap('x')} b"}, "a   b"),
        ({"role": "user", "content": [text("why"), {"type": "image_url"}, text(f"? {wrap('x')}")]}, "why?"),
        ({"role": "user", "content": wrap("only memory")}, "first"),
        ({"role": "assistant", "content": "an answer"}, "first"),
        ({"role": "user", "content": None}, "first"),
    ],
)
def test_the_last_user_message_that_says_something_is_what_is_asked(last: dict[str, Any], query: str) -> None:
    assert outline_chat([{"role": "user", "content": "first"}, last]).query() == query


def test_messages_without_memory_stay_as_they_are() -> None:
    messages = [
        {"role": "system", "content": "be short", "name": "s"},
        {"role": "user", "content": f"a {wrap('x')}"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": [text("plain")], "tool_call_id": "1"},
    ]
    outline = outline_chat(messages)
    assert outline.spans == ["x"]
    filled = outline.fill([MEMORY_OF_LATENTS])
    assert [filled[0], filled[2], filled[3]] == [messages[0], messages[2], messages[3]]
    assert filled[1]["role"] == "user"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be a list"),
        ([], "messages must be a list"),
        (["x"], "message 0: expected an object"),
        ([{"role": "user", "content": f"{MEMORY_START}x"}], "message 0, character 0"),
        ([{"role": "user", "content": f"a {MEMORY}"}], "literal"),
        ([{"role": wrap("user"), "content": "x"}], "role"),
        ([{"role": "user", "content": ["x"]}], "content part must be an object"),
        ([{"role": "user", "content": [LATENTS]}], "not taken from clients"),
    ],
)
def test_what_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        outline_chat(messages)
