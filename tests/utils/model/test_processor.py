"""Prompts and targets with the chunk size, the tokenizers and the limit of one checkpoint."""

from __future__ import annotations

import pytest

from tests.support.tiny import tokenizers
from utils.errors import PromptError
from utils.model.markers import wrap
from utils.model.processor import Processor

PROCESSOR = Processor(tokenizers=tokenizers(), chunk_size=4)
TEXT = f"ab{wrap('0123456789')}"


def test_a_target_ends_with_the_end_token() -> None:
    assert PROCESSOR.tokenizers.decoder.decode(PROCESSOR.target_ids("yes")) == "yes<|im_end|>"
    with pytest.raises(PromptError, match="empty"):
        PROCESSOR.target_ids("")


def test_a_chunk_size_of_zero_is_not_the_default() -> None:
    assert PROCESSOR.parse_raw(TEXT).spans[0].chunk_size == 4
    assert PROCESSOR.parse_raw(TEXT, 2).spans[0].chunk_size == 2
    with pytest.raises(PromptError, match="chunk size must be at least 1, got 0"):
        PROCESSOR.parse_raw(TEXT, 0)
    with pytest.raises(PromptError, match="chunk size must be at least 1, got 0"):
        PROCESSOR.parse_chat([{"role": "user", "content": TEXT}], 0)
