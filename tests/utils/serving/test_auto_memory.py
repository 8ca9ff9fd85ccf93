"""Which parts of a chat become memory without markers, and why the others do not."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("orjson")
pytest.importorskip("fastapi")

from utils.errors import PromptError
from utils.serving.api_error import ApiError
from utils.serving.auto_memory import mark_long_parts
from utils.serving.chat_parts import outline_chat, text_part
from utils.serving.request_options import OptionsReader

LONG = "x = 1\n" * 10
SHORT = "Be brief."
ASKED, CONTINUED, LITTLE = "the last user message", "the model continues it", "shorter than 40 characters"


def marked(*messages: tuple[str, Any], most: int = 9) -> tuple[list[str], list[tuple[int, str | None]]]:
    chat = [{"role": role, "content": content} for role, content in messages]
    outline = mark_long_parts(outline_chat(chat), 10, most)
    return outline.spans, [(part.message, part.reason) for part in outline.auto or ()]


def test_what_fills_a_chat_becomes_memory() -> None:
    spans, parts = marked(
        ("system", LONG + "s"), ("user", LONG + "old"), ("assistant", LONG + "a"), ("user", LONG + "asked"),
        ("tool", LONG + "t"), ("system", SHORT),
    )  # fmt: skip
    assert spans == [LONG + "s", LONG + "old", LONG + "a", LONG + "t"]
    assert parts == [(0, None), (1, None), (2, None), (3, ASKED), (4, None), (5, LITTLE)]


def test_what_the_model_continues_stays() -> None:
    assert marked(("user", "Hi"), ("assistant", LONG)) == ([], [(0, ASKED), (1, CONTINUED)])
    assert marked(("assistant", LONG), ("user", "Hi")) == ([LONG], [(0, None), (1, ASKED)])


def test_parts_are_judged_one_by_one() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    chat = [("tool", [text_part(SHORT), picture, text_part(LONG)]), ("user", "Hi")]
    assert marked(*chat) == ([LONG], [(0, LITTLE), (0, None), (1, ASKED)])
    outline = mark_long_parts(outline_chat([{"role": role, "content": content} for role, content in chat]), 10, 9)
    filled = outline.fill([[text_part("LATENTS")]])
    assert filled[0]["content"] == [text_part(SHORT), picture, text_part("LATENTS")]
    assert filled[1] == {"role": "user", "content": "Hi"}


def test_markers_go_first() -> None:
    spans, parts = marked(("tool", LONG), ("user", "<|memory_start|>a<|memory_end|> b"))
    assert (spans, parts) == (["a"], [])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ApiError, match="2 long parts would become memory spans, the limit is 1"):
        marked(("tool", LONG), ("tool", LONG), ("user", "Hi"), most=1)
    with pytest.raises(PromptError, match="message 0: the role is 5"):
        marked((5, LONG), ("user", "Hi"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("default", "given", "wanted"),
    [(None, None, None), (None, True, 500), (None, 50, 50), (None, False, None), (80, None, 80), (80, True, 80),
     (80, False, None), (80, 7, 7)],
)  # fmt: skip
def test_the_request_has_the_last_word(default: int | None, given: Any, wanted: int | None) -> None:
    reader = OptionsReader([4], None, auto=default)
    assert reader.read({"code_llava": {"auto": given}}).auto == wanted


@pytest.mark.parametrize("given", [0, -1, 1.5, "yes", []])
def test_odd_values(given: Any) -> None:
    with pytest.raises(ApiError, match=r"auto is .*, expected true, false"):
        OptionsReader([4], None).read({"code_llava": {"auto": given}})
