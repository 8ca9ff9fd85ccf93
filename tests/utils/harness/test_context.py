"""Contexts of lm-eval as prompts: which part becomes memory, and chats."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny
from utils.compress.expander import Expander
from utils.compress.select import Expansion
from utils.errors import PromptError
from utils.harness.context import ChatContext, ContextReader, mark_longest
from utils.model.markers import MARKERS, MEMORY_END, MEMORY_START, split_spans, wrap
from utils.model.processor import Processor
from utils.model.prompt import PromptTokenizers

BOOK = "It was a dark and stormy night.\nNobody slept.\n\nMorning came, and with it the mail."
ASK = "Question: who slept?"
LONG = 70


def reader(tokenizers: PromptTokenizers | None = None, least: int | None = None, **values: object) -> ContextReader:
    tokenizers = tokenizers or tiny.tokenizers()
    processor = Processor(tokenizers=tokenizers, chunk_size=4)
    return ContextReader(processor, Expander(tokenizers), least_memory_tokens=least, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "memory", "after"),
    [
        ("Read the story.\n\n", BOOK, f"\n\n{ASK}"),
        ("Read the story.\n\n", BOOK, f"\n\n{ASK}\n\nAnswer:"),
        ("Read.\n", BOOK.replace("\n\n", "\n"), f"\n{ASK}"),
        ("Read.\n", BOOK.replace("\n\n", "\n"), f"\n{ASK}\nThe answer is:"),
        ("Read the story.\n\n", BOOK.replace("\n\n", "\n"), f"\n{ASK} Answer: it was, as all will agree with me,"),
        ("", "Read this long text: " + BOOK.replace("\n", " "), f"\n{ASK}"),
        ("It was\n", BOOK.replace("\n\n", " "), f"\n \t\n\n{ASK}\n"),
    ],
)
def test_what_stands_between_instruction_and_question_becomes_memory(before: str, memory: str, after: str) -> None:
    assert mark_longest(before + memory + after, LONG, len) == before + wrap(memory) + after


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "short", "Read.\n\nshort\n\nWho?", "one line " * 20, "Read.\n" + BOOK, "Answer:", "a:\n\nb:\n\nc:"],
)
def test_what_has_no_long_part_or_no_question_stays(text: str) -> None:
    assert mark_longest(text, LONG, len) == text


@given(text=st.text(alphabet="ab:\n ", max_size=80), least=st.integers(1, 30))
def test_marking_adds_two_markers_around_enough_text_or_none(text: str, least: int) -> None:
    marked = mark_longest(text, least, len)
    assert marked.replace(MEMORY_START, "").replace(MEMORY_END, "") == text
    memories = [piece.text for piece in split_spans(marked, "it") if piece.is_memory]
    assert len(memories) <= 1
    for memory in memories:
        assert len(memory) >= least
        assert memory == memory.strip()
        assert 0 < len(marked.rpartition(MEMORY_END)[2].strip()) < least


def test_tokens_are_the_encoders() -> None:
    text = f"Read.\n\n{'é' * 20}\n\nWho?"  # 40 bytes, which are its tokens
    assert len(reader(least=40).read(text).spans) == 1
    assert reader(least=41).read(text).spans == ()


def test_marked_text_is_read_as_it_stands_and_only_once() -> None:
    of = reader(least=1)
    text = f"a {wrap('one')} b {wrap('two')} c"
    prompt = of.read(text)
    assert [span.text for span in prompt.spans] == ["one", "two"]
    assert of.read(text) is prompt
    of.forget()
    assert of.read(text) is not prompt
    assert of.read(text) == prompt


def test_part_of_the_memory_stays_text() -> None:
    text = wrap("a = 1\nb = 2\nc = 3") + " What is b?"
    prompt = reader(expansion=Expansion(tokens=6)).read(text)
    (span,) = prompt.spans
    assert [span.text[start:stop] for segment in span.segments for start, stop in segment.chars] == ["b = 2\n"]


def test_an_empty_context_and_bad_markers_are_errors() -> None:
    with pytest.raises(PromptError, match="empty"):
        reader().read("")
    with pytest.raises(PromptError, match=r"memory_end\|> without"):
        reader(least=1).read(f"a{MEMORY_END}")


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": f"{wrap('x = 2')} and {wrap('y = 3')}: what is x?"},
]


def test_a_chat_is_read_as_the_processor_reads_it() -> None:
    of = reader()
    context = of.chat(CHAT)
    assert of.read(context) == of.processor.parse_chat(CHAT)
    assert wrap("x = 2") in context
    assert context.endswith("<|im_start|>assistant\n")
    assert "what is x?" in of.read(context).query


def test_a_chats_copy_keeps_what_it_asks() -> None:
    context = reader().chat(CHAT)
    for copied in (pickle.loads(pickle.dumps(context)), copy.deepcopy(context)):
        assert isinstance(copied, ChatContext)
        assert (copied, copied.query) == (context, context.query)


def test_the_longest_content_of_a_chat_becomes_memory() -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Read.\n\n{BOOK}\n\n{ASK}"}]
    of = reader(least=LONG)
    prompt = of.read(of.chat(chat))
    assert [span.text for span in prompt.spans] == [BOOK]
    assert ASK in prompt.query
    assert BOOK not in prompt.query


def test_the_last_message_is_continued() -> None:
    context = reader().chat([*CHAT, {"role": "assistant", "content": "x is"}], add_generation_prompt=False)
    assert context.endswith("<|im_start|>assistant\nx is")


@pytest.mark.parametrize("template", ["no content at all", "{{ messages[0]['content'] * 2 }}"])
def test_a_template_that_loses_memory_is_an_error(template: str) -> None:
    with pytest.raises(PromptError, match="1 memories"):
        reader(template=template).chat([{"role": "user", "content": wrap("x")}])


def test_special_tokens_are_written_once() -> None:
    tokenizers = PromptTokenizers(
        decoder=tiny.byte_tokenizer(markers=True, template=tiny.CHATML, bos=True),
        encoder=tiny.byte_tokenizer(markers=False),
    )
    of, bos = reader(tokenizers), tokenizers.decoder.bos_token_id
    plain, begun = of.read("hello"), of.read(f"{tiny.START}hello")
    assert plain.input_ids == begun.input_ids
    assert plain.input_ids.count(bos) == 1
    chat = of.chat([{"role": "user", "content": "hello"}])
    assert of.read(chat).input_ids.count(bos) == chat.count(tiny.START) == 2


def test_markers_are_the_only_words_that_cannot_be_said() -> None:
    of = reader(least=1)
    for marker in MARKERS:
        with pytest.raises(PromptError):
            of.read(f"a {marker} b")
