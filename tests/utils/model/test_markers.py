"""Marker ids come from the tokenizer, or the checkpoint is refused; a memory of known bounds may hold anything."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from tests.support.tiny import byte_tokenizer
from utils.errors import CheckpointError, PromptError
from utils.model.markers import MARKERS, MEMORY, MEMORY_END, MEMORY_START, Marked, MarkerIds, Piece, split_spans, wrap

HOSTILE = f"a{MEMORY_END}b{MEMORY}{MEMORY_START}"


def test_ids_are_the_tokenizers() -> None:
    tokenizer = byte_tokenizer(markers=True)
    ids = MarkerIds.from_tokenizer(tokenizer)
    assert [ids.start, ids.end, ids.memory] == tokenizer.convert_tokens_to_ids([MEMORY_START, MEMORY_END, MEMORY])
    assert len({ids.start, ids.end, ids.memory}) == len(MARKERS)


def test_a_tokenizer_that_knows_none_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="add the three markers"):
        MarkerIds.from_tokenizer(byte_tokenizer(markers=False))


@pytest.mark.parametrize("memory", [HOSTILE, *MARKERS, "plain"])
def test_a_wrapped_memory_may_hold_markers(memory: str) -> None:
    text = "before " + wrap(memory) + "\n" + wrap("x") + f" {MEMORY_START}y{MEMORY_END} behind"
    assert isinstance(text, Marked)
    pieces = [Piece("before ", False), Piece(memory, True), Piece("\n", False), Piece("x", True), Piece(" ", False),
              Piece("y", True), Piece(" behind", False)]  # fmt: skip
    for same in (text, copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert list(split_spans(same, "the prompt")) == pieces
    # As any text, it is what a person would have typed.
    written = (
        f"before {MEMORY_START}{memory}{MEMORY_END}\n{MEMORY_START}x{MEMORY_END} {MEMORY_START}y{MEMORY_END} behind"
    )
    assert text == json.loads(json.dumps(text)) == written


def test_what_is_added_to_a_memory_is_read_as_written() -> None:
    with pytest.raises(PromptError, match=r"without a <.memory_end.> after it"):
        wrap("x") + MEMORY_START
    with pytest.raises(PromptError, match="literal"):
        MEMORY + wrap("x")
    with pytest.raises(PromptError, match="message 3: the memory span is empty"):
        list(split_spans(wrap(""), "message 3"))
