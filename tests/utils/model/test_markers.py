"""Marker ids come from the tokenizer, or the checkpoint is refused."""

from __future__ import annotations

import pytest

from tests.support.tiny import byte_tokenizer
from utils.errors import CheckpointError
from utils.model.markers import MARKERS, MEMORY, MEMORY_END, MEMORY_START, MarkerIds


def test_ids_are_the_tokenizers() -> None:
    tokenizer = byte_tokenizer(markers=True)
    ids = MarkerIds.from_tokenizer(tokenizer)
    assert [ids.start, ids.end, ids.memory] == tokenizer.convert_tokens_to_ids([MEMORY_START, MEMORY_END, MEMORY])
    assert len({ids.start, ids.end, ids.memory}) == len(MARKERS)


def test_a_tokenizer_that_knows_none_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="add the three markers"):
        MarkerIds.from_tokenizer(byte_tokenizer(markers=False))
