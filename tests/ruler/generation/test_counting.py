"""Counting in pieces gives what counting the whole gives, for tokenizers that split words and those that do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ruler.generation.counting import PieceCounter
from ruler.generation.tokenizers import TextTokenizer, from_hugging_face

VOCABULARY = ["a", "b", "c", ".", "\n", " ", "Ġ", "Ċ", "aa", "ab", ".Ċ", "Ġa", "Ġab", "ĊĊ", " a", "b a", ". ", ".\n"]
MERGES = [("a", "a"), ("a", "b"), (".", "Ċ"), ("Ġ", "a"), ("Ġ", "ab"), ("Ċ", "Ċ"), ("b", " a"), (" ", "a"), (".", " ")]
MERGES += [(".", "\n")]


def tokenizer(splitter: pre_tokenizers.PreTokenizer | None) -> TextTokenizer:
    model = models.BPE(vocab={token: number for number, token in enumerate(VOCABULARY)}, merges=MERGES)
    backend = Tokenizer(model)
    if splitter:
        backend.pre_tokenizer = splitter
    return from_hugging_face(backend, "toy", "")


SPLITTERS = {
    "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "whitespace": pre_tokenizers.Whitespace(),
    "none": None,
}
pieces = st.lists(st.text(alphabet="abc. \n", max_size=5), max_size=12)


@pytest.mark.parametrize("splitter", SPLITTERS)
@given(texts=st.lists(pieces, min_size=1, max_size=4))
def test_parts_add_up(splitter: str, texts: list[list[str]]) -> None:
    toy = tokenizer(SPLITTERS[splitter])
    counter = PieceCounter(toy)
    for text in texts:
        assert counter.count(text) == toy.count(["".join(text)])[0]


@given(text=pieces, position=st.integers(0, 60))
def test_beginning_of_a_text(text: list[str], position: int) -> None:
    toy = tokenizer(SPLITTERS["byte-level"])
    whole = "".join(text)
    position = min(position, len(whole))
    assert PieceCounter(toy).count_before(text, position) == toy.count([whole[:position]])[0]


def test_a_tokenizer_that_does_not_split_words_is_never_added_up() -> None:
    assert not PieceCounter(tokenizer(None)).adds_up
    assert PieceCounter(tokenizer(SPLITTERS["byte-level"])).adds_up


def test_a_full_memory_is_emptied() -> None:
    toy = tokenizer(SPLITTERS["byte-level"])
    counter = PieceCounter(toy, max_remembered=3)
    for text in (["a", " b", " ab"], [" ab", " a", " aa", " c"], ["a", " ab"], []):
        assert counter.count(text) == toy.count(["".join(text)])[0]
