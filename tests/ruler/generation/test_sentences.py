"""Sentence boundaries: the same as NLTK's Punkt tokenizer with the same data, for any text of single spaces."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruler.generation.counting import PieceCounter
from ruler.generation.essay import Essay
from ruler.generation.sentences import ENGLISH, english_splitter
from ruler.generation.tokenizers import load_tokenizer
from tests.support.ruler_recipes import reference_folder

ATOMS = re.findall(
    r"\S+",
    """Mr Dr e.g U.S a J The the foo Bar in In 1 12 3.5 -2 i It it's however However -- ... .. . ? ! ." .) ?" !) ( [ "
    ' ) ; : , { } * @ & # - ` etc p.m Jan b stewart Stewart al No Inc été Été — « » .” ’ 1. I Bach x-Mr Zed""",
)


@pytest.fixture(scope="module")
def nltk_tokenizer() -> Any:
    """NLTK's own splitter with our data."""
    punkt = pytest.importorskip("nltk.tokenize.punkt")

    def lines(name: str) -> list[str]:
        return (ENGLISH / name).read_text(encoding="utf-8").splitlines()

    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(lines("abbrev_types.txt"))
    parameters.sent_starters = set(lines("sent_starters.txt"))
    parameters.collocations = {tuple(line.split("\t")) for line in lines("collocations.tab")}
    for line in lines("ortho_context.tab"):
        word, flags = line.split("\t")
        parameters.ortho_context[word] = int(flags)
    return punkt.PunktSentenceTokenizer(parameters)


texts = st.lists(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from([".", "?", "!", "", ""]), st.sampled_from([" ", " ", ""])),
    min_size=1,
    max_size=14,
).map(lambda parts: re.sub(r"\s+", " ", "".join(map("".join, parts))).strip())


@given(texts)
def test_agrees_with_nltk(nltk_tokenizer: Any, text: str) -> None:
    assert english_splitter().split(text) == nltk_tokenizer.tokenize(text)


def test_agrees_with_nltk_on_an_essay(nltk_tokenizer: Any) -> None:
    text = json.loads((reference_folder() / "PaulGrahamEssays.json").read_text())["text"]
    text = re.sub(r"\s+", " ", text).strip()
    assert english_splitter().split(text) == nltk_tokenizer.tokenize(text)


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
    assert english_splitter().split(text) == expected


@pytest.mark.slow
@given(st.lists(texts, min_size=1, max_size=6), st.data())
def test_sentences_of_the_first_words(parts: list[str], data: st.DataObject) -> None:
    """Growing text by text gives what splitting each prefix anew gives, repetitions included."""
    words = " ".join(parts).split(" ")
    essay = Essay(words, PieceCounter(load_tokenizer("hf", str(reference_folder() / "tokenizer.json"))))
    for _ in range(4):
        count = data.draw(st.integers(1, 3 * len(words)))
        prefix = " ".join((words * 3)[:count])
        assert essay.sentence_pieces(count) == [" " + text for text in english_splitter().split(prefix.strip())]


def test_a_text_is_called_too_long_only_when_it_is() -> None:
    words = re.sub(r"\s+", " ", json.loads((reference_folder() / "PaulGrahamEssays.json").read_text())["text"]).split(
        " "
    )
    counter = PieceCounter(load_tokenizer("hf", str(reference_folder() / "tokenizer.json")))
    called = 0
    for num_words in (500, 8192, 8193, 20000, 40000):
        tokens = counter.count(Essay(words, counter).sentence_pieces(num_words))
        essay = Essay(words, counter)
        assert not essay.surely_longer(num_words, tokens)
        called += essay.surely_longer(num_words, tokens // 2)
    assert called == 4  # all but 500 words, which are less than a block
