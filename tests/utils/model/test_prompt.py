"""Parsing: any text around any spans comes through untouched, and everything ambiguous is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.processes import traced
from tests.support.tiny import CHATML, byte_tokenizer, tokenizers
from utils.errors import CheckpointError, ConfigError, PromptError
from utils.model.markers import MARKERS, MEMORY, MEMORY_END, MEMORY_START, wrap
from utils.model.prompt import (
    MemoryLimit,
    MemoryPrompt,
    PromptTokenizers,
    has_markers,
    num_latents,
    parse_chat_prompt,
    parse_raw_prompt,
    split_spans,
)

TOKENIZERS = tokenizers()

# Text as people write it, and pieces that nearly are markers, so that they meet at every border.
FRAGMENTS = st.sampled_from(
    ["<|memory", "<|", "|>", "memory_start|>", "_end|>", "<|memory_star", "<", ">", "\r\n", "\n", " ", "\t", "é", "🦙"]
)
TEXT = st.lists(st.one_of(FRAGMENTS, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=6).map(
    "".join
)


def is_plain(text: str) -> bool:
    """Whether no marker or other special token stands in the text, nor appears where it meets a marker."""
    specials = [*MARKERS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return not any(special in text for special in specials)


PLAIN = TEXT.filter(is_plain)
MEMORIES = PLAIN.filter(bool)


@st.composite
def marked_texts(draw: Any) -> tuple[list[str], list[str]]:
    """The plain pieces and the memories between them, as often adjacent and equal as not."""
    memories = draw(st.lists(st.one_of(st.just("same"), MEMORIES), max_size=5))
    plain = draw(st.lists(st.one_of(st.just(""), PLAIN), min_size=len(memories) + 1, max_size=len(memories) + 1))
    return plain, memories


def write(plain: list[str], memories: list[str]) -> str:
    text = plain[0]
    for memory, after in zip(memories, plain[1:], strict=True):
        text += MEMORY_START + memory + MEMORY_END + after
    return text


def encode(text: str) -> list[int]:
    return TOKENIZERS.decoder(text, add_special_tokens=False)["input_ids"]


def memory_ids(text: str) -> list[int]:
    return TOKENIZERS.encoder(text, add_special_tokens=False)["input_ids"]


def check_spans(prompt: MemoryPrompt, memories: list[str], sizes: list[int]) -> None:
    marks = TOKENIZERS.markers
    assert [span.text for span in prompt.spans] == memories
    for span, size in zip(prompt.spans, sizes, strict=True):
        assert list(span.token_ids) == memory_ids(span.text)
        assert span.num_latents == -(-len(span.token_ids) // size)
        assert prompt.input_ids[span.start - 1] == marks.start
        assert prompt.input_ids[span.stop] == marks.end
        assert set(prompt.input_ids[span.start : span.stop]) == {marks.memory}
    assert prompt.input_ids.count(marks.memory) == prompt.num_latents
    assert prompt.memory_tokens == sum(len(memory_ids(memory)) for memory in memories)


def write_back(prompt: MemoryPrompt) -> str:
    """Each run of placeholders put back into its text: the prompt as it was written."""
    text, copied = "", 0
    for span in prompt.spans:
        text += TOKENIZERS.decoder.decode(prompt.input_ids[copied : span.start]) + span.text
        copied = span.stop
    return text + TOKENIZERS.decoder.decode(prompt.input_ids[copied:])


@pytest.mark.slow
@given(marked_texts(), st.integers(1, 40))
def test_raw_ids_reassemble(pieces: tuple[list[str], list[str]], chunk_size: int) -> None:
    plain, memories = pieces
    text = write(plain, memories)
    prompt = parse_raw_prompt(text, TOKENIZERS, chunk_size)
    check_spans(prompt, memories, [chunk_size] * len(memories))
    marks = TOKENIZERS.markers
    expected = encode(plain[0])
    for memory, after in zip(memories, plain[1:], strict=True):
        latents = -(-len(memory_ids(memory)) // chunk_size)
        expected += [marks.start, *[marks.memory] * latents, marks.end, *encode(after)]
    assert prompt.input_ids == expected
    assert write_back(prompt) == text


@given(st.lists(marked_texts(), min_size=1, max_size=3), st.data())
def test_chat_spans_and_text_around_them(turns: list[tuple[list[str], list[str]]], data: Any) -> None:
    memories = [memory for _, of_turn in turns for memory in of_turn]
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=len(memories), max_size=len(memories)))
    messages = [{"role": "user", "content": write(*turn)} for turn in turns]
    prompt = parse_chat_prompt(messages, TOKENIZERS, sizes)
    check_spans(prompt, memories, sizes)
    written = "".join(f"<|im_start|>user\n{message['content']}<|im_end|>\n" for message in messages)
    assert write_back(prompt) == written + "<|im_start|>assistant\n"


@given(st.lists(st.one_of(st.sampled_from(MARKERS), st.sampled_from(["x", "", "<|memory"])), max_size=6))
def test_any_order_of_markers_parses_or_is_refused(parts: list[str]) -> None:
    text = "".join(parts)
    # Well-formed: plain text, or spans of plain text that is not empty.
    plain = r"(?:(?!<\|memory(?:_start|_end)?\|>).)"
    if re.fullmatch(rf"{plain}*(?:<\|memory_start\|>{plain}+<\|memory_end\|>{plain}*)*", text):
        assert write_back(parse_raw_prompt(text, TOKENIZERS, 4)) == text
    else:
        with pytest.raises(PromptError, match="memory"):
            parse_raw_prompt(text, TOKENIZERS, 4)


@given(st.integers(1, 5000), st.integers(1, 600))
def test_num_latents_rounds_up(num_tokens: int, chunk_size: int) -> None:
    latents = num_latents(num_tokens, chunk_size)
    assert (latents - 1) * chunk_size < num_tokens <= latents * chunk_size


@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(0, 4), (4, 0), (-1, 4)])
def test_num_latents_refuses_nothing(num_tokens: int, chunk_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        num_latents(num_tokens, chunk_size)


REFUSED = {
    "start without end": (f"abc {MEMORY_START}def", "character 4", "without a <|memory_end|>"),
    "end without start": (f"abc{MEMORY_END}", "character 3", "without a <|memory_start|>"),
    "nested": (f"{MEMORY_START}a{MEMORY_START}b{MEMORY_END}", "character 17", "begins at character 0"),
    "empty": (f"ab{MEMORY_START}{MEMORY_END}", "character 2", "span is empty"),
    "placeholder in text": (f"a {MEMORY} b", "character 2", "literal <|memory|>"),
    "placeholder in memory": (f"{MEMORY_START}x{MEMORY}{MEMORY_END}", "character 17", "literal <|memory|>"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_place_and_excerpt(case: str) -> None:
    text, place, reason = REFUSED[case]
    with pytest.raises(PromptError) as raised:
        parse_raw_prompt(text, TOKENIZERS, 4)
    assert "the prompt, " + place in str(raised.value)
    assert reason in str(raised.value)
    with pytest.raises(PromptError) as raised:
        parse_chat_prompt([{"role": "system", "content": "x"}, {"role": "user", "content": text}], TOKENIZERS, 4)
    assert "message 1, " + place in str(raised.value)
    assert reason in str(raised.value)


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_in_a_role_is_refused(marker: str) -> None:
    with pytest.raises(PromptError, match="message 0: the role holds a memory marker"):
        parse_chat_prompt([{"role": f"user{marker}", "content": "hi"}], TOKENIZERS, 4)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (["hi"], "message 0: expected an object"),
        ([{"role": "user"}], "message 0: content must be a text, got NoneType"),
        ([{"role": "user", "content": ["x"]}], "message 0: content must be a text, got list"),
        ([{"content": "x"}], "message 0: role must be a text"),
    ],
)
def test_messages_of_another_shape(messages: Any, reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        parse_chat_prompt(messages, TOKENIZERS, 4)


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": "so\ud83d"}, "message 1 holds half a character .* at character 2"),
        ({"role": "user\udc00", "content": "x"}, "message 1: the role holds half a character"),
        ({"role": "user", "content": "<|memory_start|>a\udcff<|memory_end|>"}, "message 1 holds half a character"),
    ],
)
def test_half_a_character_is_refused(message: dict[str, str], place: str) -> None:
    """JSON escapes and undecodable arguments can bring one in."""
    with pytest.raises(PromptError, match=place):
        parse_chat_prompt([{"role": "user", "content": "Hello"}, message], TOKENIZERS, 4)


def test_a_chat_needs_a_template() -> None:
    plain = PromptTokenizers(decoder=byte_tokenizer(markers=True), encoder=TOKENIZERS.encoder)
    with pytest.raises(PromptError, match="no chat template"):
        parse_chat_prompt([{"role": "user", "content": "x"}], plain, 4)


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "nothing", "{{ messages[0]['content'][:20] }}"],
    ids=["repeats", "drops", "cuts"],
)
def test_a_template_that_changes_the_spans_is_refused(template: str) -> None:
    odd = PromptTokenizers(decoder=byte_tokenizer(markers=True, template=template), encoder=TOKENIZERS.encoder)
    with pytest.raises(PromptError, match="chat template"):
        parse_chat_prompt([{"role": "user", "content": wrap("abc")}], odd, 4)


def test_template_arguments_reach_the_template() -> None:
    template = "{% if shout %}LOUD {% endif %}" + CHATML
    odd = PromptTokenizers(decoder=byte_tokenizer(markers=True, template=template), encoder=TOKENIZERS.encoder)
    prompt = parse_chat_prompt([{"role": "user", "content": "x"}], odd, 4, shout=True, add_generation_prompt=False)
    assert odd.decoder.decode(prompt.input_ids) == "LOUD <|im_start|>user\nx<|im_end|>\n"


def test_one_beginning_token_and_never_two() -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    with_bos = PromptTokenizers(
        decoder=byte_tokenizer(markers=True, template=template, bos=True),
        encoder=byte_tokenizer(markers=False, bos=True),
    )
    text = wrap("abc")
    raw = parse_raw_prompt(text, with_bos, 4)
    chat = parse_chat_prompt([{"role": "user", "content": text}], with_bos, 4)
    assert raw.input_ids == chat.input_ids
    assert raw.input_ids.count(with_bos.decoder.bos_token_id) == 1
    # Also where the text brings it.
    assert parse_raw_prompt(with_bos.decoder.bos_token + text, with_bos, 4).input_ids == raw.input_ids
    # The memory is read without special tokens.
    assert list(raw.spans[0].token_ids) == memory_ids("abc")


def test_chunk_size_per_span() -> None:
    text = write(["", " and ", ""], ["a" * 10, "b" * 10])
    assert [span.num_latents for span in parse_raw_prompt(text, TOKENIZERS, [4, 10]).spans] == [3, 1]
    assert [span.num_latents for span in parse_raw_prompt(text, TOKENIZERS, [5]).spans] == [2, 2]
    with pytest.raises(PromptError, match="3 chunk sizes for 2 memory spans"):
        parse_raw_prompt(text, TOKENIZERS, [4, 4, 4])
    with pytest.raises(PromptError, match="chunk size must be at least 1, got 0"):
        parse_raw_prompt(text, TOKENIZERS, [4, 0])


def test_the_limit_refuses_or_reports() -> None:
    text = write(["", ""], ["abcdef"])
    assert parse_raw_prompt(text, TOKENIZERS, 4, MemoryLimit(max_tokens=6)).spans[0].truncated_tokens == 0
    with pytest.raises(PromptError, match=r"span 0 has 6 .* 5"):
        parse_raw_prompt(text, TOKENIZERS, 4, MemoryLimit(max_tokens=5))
    span = parse_raw_prompt(text, TOKENIZERS, 4, MemoryLimit(max_tokens=4, truncate=True)).spans[0]
    assert (list(span.token_ids), span.truncated_tokens, span.num_latents) == (memory_ids("abcd"), 2, 1)
    with pytest.raises(ConfigError, match="--max-memory-tokens"):
        MemoryLimit(max_tokens=0)


def test_a_span_without_encoder_tokens_is_refused() -> None:
    from tokenizers import normalizers

    forgetful = byte_tokenizer(markers=False)
    forgetful.backend_tokenizer.normalizer = normalizers.Strip()
    both = PromptTokenizers(decoder=TOKENIZERS.decoder, encoder=forgetful)
    with pytest.raises(PromptError, match=r"memory span 1 .* has no encoder tokens"):
        parse_raw_prompt(write(["", "", ""], ["a", "  "]), both, 4)


@pytest.mark.parametrize("lost", MARKERS)
def test_a_tokenizer_without_markers(lost: str) -> None:
    decoder = byte_tokenizer(markers=False)
    decoder.add_special_tokens({"additional_special_tokens": [m for m in MARKERS if m != lost]})
    with pytest.raises(CheckpointError, match="is missing") as raised:
        PromptTokenizers(decoder=decoder, encoder=TOKENIZERS.encoder)
    assert lost in str(raised.value)


def test_parsing_needs_no_torch() -> None:
    assert not {"torch", "transformers"} & traced("-c", "import utils.model.prompt")[1]


@pytest.mark.parametrize("before", [(1 << 20) - 20, (1 << 20) - 1, 1 << 20, 3 << 20])
def test_markers_are_found_anywhere_in_a_long_text(before: int) -> None:
    plain, span, after = "<" * before, "y" * (1 << 20), "<|memory"
    pieces = [*split_spans(plain + MEMORY_START + span + MEMORY_END + after, "the text")]
    assert [piece.text for piece in pieces] == [plain, span, after]
    assert has_markers(plain + MEMORY_END)
    assert not has_markers(plain + after)
