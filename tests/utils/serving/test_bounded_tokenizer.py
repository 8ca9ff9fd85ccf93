"""Ids up to a limit: the same as without one, or None after little work."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny
from utils.serving.bounded_tokenizer import first_ids, ids_within

TOKENIZER = tiny.byte_tokenizer(markers=True)


class Counting:
    """A tokenizer that notes how many characters it was given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str, **arguments: Any) -> Any:
        self.characters += len(text)
        return self._inner(text, **arguments)


@given(text=st.text(max_size=40), limit=st.integers(0, 60))
def test_ids_are_the_tokenizers_or_too_many(text: str, limit: int) -> None:
    expected = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids_within(TOKENIZER, text, limit) == (expected if len(expected) <= limit else None)


@pytest.mark.parametrize("length", [100, 5000, 20_000])
def test_long_texts(length: int) -> None:
    text = "".join(f"line {number}\n" for number in range(length))[:length]
    assert ids_within(TOKENIZER, text, length) == TOKENIZER(text)["input_ids"]
    assert ids_within(TOKENIZER, text, length - 1) is None
    first = first_ids(TOKENIZER, text, 90)
    assert len(first) > 90
    assert first[:90] == TOKENIZER(text)["input_ids"][:90]


def test_what_cannot_fit_is_not_read() -> None:
    counting = Counting(TOKENIZER)
    for length in (10_000, 10_000_000):
        counting.characters = 0
        assert ids_within(counting, "x" * length, 512) is None
        assert counting.characters < 10_000


def test_special_tokens_are_added_on_request() -> None:
    tokenizer = tiny.byte_tokenizer(markers=True, bos=True)
    assert ids_within(tokenizer, "ab", 3, special_tokens=True) == [257, *(ids_within(tokenizer, "ab", 3) or [])]
    assert ids_within(tokenizer, "ab", 2, special_tokens=True) is None
    # One token of beginning, whether or not the text brings it.
    brought = ids_within(tokenizer, f"{tokenizer.bos_token}ab", 3, special_tokens=True)
    assert brought == ids_within(tokenizer, "ab", 3, special_tokens=True)
