"""Sentence boundaries with the packaged English data, and the sentences of an essay's first words."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruler.generation.counting import PieceCounter
from ruler.generation.data_files import RulerData
from ruler.generation.essay import ENGLISH, Essay, english_splitter
from ruler.generation.tokenizers import load_tokenizer
from tests.support.ruler_recipes import reference_folder
from utils.errors import DatasetError

ATOMS = re.findall(
    r"\S+",
    """Mr Dr e.g U.S a J The the foo Bar in In 1 12 3.5 -2 i It it's however However -- ... .. . ? ! ." .) ?" !) ( [ "
    ' ) ; : , { } * @ & # - ` etc p.m Jan b stewart Stewart al No Inc été Été — « » .” ’ 1. I Bach x-Mr Zed""",
)

texts = st.lists(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from([".", "?", "!", "", ""]), st.sampled_from([" ", " ", ""])),
    min_size=1,
    max_size=14,
).map(lambda parts: re.sub(r"\s+", " ", "".join(map("".join, parts))).strip())


@cache
def counter() -> PieceCounter:
    return PieceCounter(load_tokenizer("hf", str(reference_folder() / "tokenizer.json")))


def essay_words() -> list[str]:
    return RulerData(reference_folder()).essay_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Who came. He left.", ["Dr. Who came.", "He left."]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("It was 3.5 p.m. in the U.S. then.", ["It was 3.5 p.m. in the U.S. then."]),
        ("", []),
    ],
)
def test_examples(text: str, expected: list[str]) -> None:
    assert english_splitter().tokenize(text) == expected


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(ENGLISH, tmp_path, dirs_exist_ok=True)
    (tmp_path / "abbrev_types.txt").unlink()
    with pytest.raises(DatasetError, match=r"abbrev_types\.txt"):
        english_splitter(tmp_path)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(texts, min_size=1, max_size=6), st.data())
def test_sentences_of_the_first_words(parts: list[str], data: st.DataObject) -> None:
    """Growing text by text gives what splitting each prefix anew gives, repetitions included."""
    words = " ".join(parts).split(" ")
    essay = Essay(words, counter())
    for _ in range(4):
        count = data.draw(st.integers(1, 3 * len(words)))
        prefix = " ".join((words * 3)[:count])
        assert essay.sentence_pieces(count) == [" " + text for text in english_splitter().tokenize(prefix.strip())]


@pytest.mark.slow
def test_sentences_of_a_repeated_essay() -> None:
    """Over several blocks and copies of the text."""
    words = essay_words()[:10_000]
    essay = Essay(words, counter())
    for num_words in (9_999, 10_001, 21_000):
        prefix = " ".join((words * 4)[:num_words])
        assert essay.sentence_pieces(num_words) == [" " + text for text in english_splitter().tokenize(prefix)]


def test_a_text_is_called_too_long_only_when_it_is() -> None:
    words = essay_words()
    essay, asked = Essay(words, counter()), Essay(words, counter())
    called = []
    for num_words in (500, 8193, 20_000):
        tokens = counter().count(essay.sentence_pieces(num_words))
        assert not asked.surely_longer(num_words, tokens)
        called.append(asked.surely_longer(num_words, tokens // 2))
    assert called == [False, True, True]  # 500 words are less than a block
