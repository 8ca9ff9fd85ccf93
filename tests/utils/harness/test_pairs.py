"""What is given and what is scored."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

from tests.support import tiny
from tests.utils.harness.test_context import CHAT, reader
from utils.errors import ConfigError, PromptError
from utils.harness.context import ChatContext
from utils.harness.pairs import read_pair, read_whole
from utils.model.markers import wrap
from utils.model.prompt import PromptTokenizers

CONTEXTS = [
    "The answer is",
    "The answer is ",
    f"{wrap('x = 2')} x is",
    f"{wrap('x = 2')}  ",
    f"a{wrap('x = 2')}",
    f"{wrap('x = 2')} and{wrap('y = 3')}\n\n",
]


@pytest.mark.parametrize("context", [*CONTEXTS, "chat"])
def test_given_and_scored_tokens_are_those_of_the_whole(context: str) -> None:
    of = reader()
    text = of.chat(CHAT) if context == "chat" else context
    prompt, ids = read_pair(of, text, " two")
    whole = of.read(ChatContext(text + " two") if context == "chat" else text + " two")
    assert [*prompt.input_ids, *ids] == whole.input_ids
    assert prompt.spans == whole.spans
    spaces = len(text) - len(text.rstrip())
    assert len(ids) == spaces + len(" two"), "the tiny tokenizer has a token a byte"
    if context == "chat":
        assert prompt.query == of.read(text).query


def test_what_comes_after_nothing_is_scored_after_the_first_token() -> None:
    of, end = reader(), tiny.tokenizers().decoder.eos_token_id
    for context in ("", " \n"):
        prompt, ids = read_pair(of, context, "two")
        assert (prompt.input_ids, ids) == ([end], of.read(context + "two").input_ids)
    for context in ("The answer is", ""):
        with pytest.raises(PromptError, match="no token"):
            read_pair(of, context, "")


def test_special_tokens_are_given_once() -> None:
    tokenizers = PromptTokenizers(
        decoder=tiny.byte_tokenizer(markers=True, bos=True), encoder=tiny.byte_tokenizer(markers=False)
    )
    of, bos = reader(tokenizers), tokenizers.decoder.bos_token_id
    for context in ("hello", f"{wrap('x')} hello", ""):
        prompt, ids = read_pair(of, context, " you")
        assert prompt.input_ids.count(bos) == 1
        assert ids == [*map(of.processor.tokenizers.decoder.convert_tokens_to_ids, "Ġyou")]
    tokenizers.decoder.bos_token = tokenizers.decoder.eos_token = None
    with pytest.raises(ConfigError, match="neither"):
        read_pair(of, "", "two")


@pytest.mark.parametrize("most_rows", [None, 100, 7, 1])
def test_windows_score_each_token_once_with_all_the_context_there_is_room_for(most_rows: int | None) -> None:
    of, text = reader(), "abcdefghij" * 3
    pairs = list(read_whole(of, text, most_rows))
    assert [token for _, ids in pairs for token in ids] == of.read(text).input_ids
    for prompt, ids in pairs[1:]:
        assert len(prompt.input_ids) + len(ids) - 1 == most_rows
    if most_rows in (None, 100):
        assert len(pairs) == 1
    assert list(read_whole(of, "", most_rows)) == []


def test_a_text_with_memory_is_scored_behind_it() -> None:
    of = reader()
    context, rest = f"a {wrap('x = 2')} and {wrap('y')}", " then"
    assert list(read_whole(of, context + rest, 7)) == [read_pair(of, context, rest)]
    with pytest.raises(PromptError, match="no token"):
        list(read_whole(of, context, 7))
