"""What is given to a decoder and what is scored then: contexts with their continuations, and whole texts.

    prompt, ids = read_pair(reader, "The capital of France is", " Paris")

lm-eval's own models cut in the same places, so that scores without memory are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from utils.errors import ConfigError, PromptError
from utils.harness.context import ChatContext, ContextReader
from utils.harness.likelihood import Scored
from utils.model.markers import MEMORY_END, PLACEHOLDER, has_markers, split_spans
from utils.model.prompt import MemoryPrompt, with_one_beginning


def read_pair(reader: ContextReader, context: str, continuation: str) -> Scored:
    """The prompt of a context, and the decoder tokens of its continuation.

    White space at the end of the context belongs to the continuation: " word" is one token, "" and "word" are others.
    Where nothing is left of the context, the prompt is one begin-of-sequence token, or the end token of a tokenizer
    without one.

    Raises:
        PromptError: The markers are not in order, or the continuation has no token of its own.
        ConfigError: The context is empty and the tokenizer has neither token.
    """
    given, ids = _split(reader, context, continuation)
    return (reader.read_marked(given) if given else _beginning(reader)), ids


def read_whole(reader: ContextReader, text: str, most_rows: int | None) -> Iterator[Scored]:
    """The pairs that score a whole text.

    A text with memory is scored behind its last memory, given all before. Any other is scored from its first token on,
    in windows of `most_rows` rows whose context is as long as can be; it asks nothing, so no part of it becomes memory.

    Args:
        reader: Of the checkpoint.
        text: The text; an empty one has no pairs.
        most_rows: Positions of the decoder; None for no limit.

    Raises:
        PromptError: There is nothing behind the memory.
        ConfigError: The tokenizer has neither a begin-of-sequence nor an end token.
    """
    if has_markers(text):
        end = text.rfind(MEMORY_END) + len(MEMORY_END)
        yield read_pair(reader, text[:end], text[end:])
        return
    ids = _tokens(reader, text, special=False)
    (first,) = _beginning(reader).input_ids
    for window in get_rolling_token_windows(ids, first, most_rows or len(ids) + 1, 1):
        given, scored = make_disjoint_window(window)
        yield MemoryPrompt(input_ids=given, spans=()), scored


def _split(reader: ContextReader, context: str, continuation: str) -> tuple[str, list[int]]:
    """The context without white space at its end, and the tokens that follow."""
    text = reader.marked(context)
    *memories, last = split_spans(text, "the context")
    kept = last.text.rstrip()
    given = text[: len(text) - len(last.text) + len(kept)]
    if isinstance(context, ChatContext):
        given = ChatContext(given, context.query)
    # A placeholder stands for what comes before: no token reaches over it, and tokenizers treat a text's beginning in
    # their own ways.
    before = PLACEHOLDER if memories else ""
    special = bool(given) and not memories and not isinstance(given, ChatContext)
    num_given = len(_tokens(reader, before + kept, special))
    ids = _tokens(reader, before + last.text + continuation, special)[num_given:]
    if not ids:
        raise PromptError(f"the continuation {continuation!r} has no token of its own: there is nothing to score")
    return given, ids


def _beginning(reader: ContextReader) -> MemoryPrompt:
    decoder = reader.processor.tokenizers.decoder
    found = next((token for token in (decoder.bos_token_id, decoder.eos_token_id) if token is not None), None)
    if found is None:
        raise ConfigError("the decoder's tokenizer has neither a begin-of-sequence nor an end token to score after")
    return MemoryPrompt(input_ids=[int(found)], spans=())


def _tokens(reader: ContextReader, text: str, special: bool) -> list[int]:
    decoder = reader.processor.tokenizers.decoder
    ids = list(decoder(text, add_special_tokens=special)["input_ids"])
    return with_one_beginning(ids, decoder) if special else ids
