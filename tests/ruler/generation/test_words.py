"""Word lists and the list of all pairs that is never made."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruler.generation.words import FILES, KNOWN_NOUNS, WordPairs, load_word_lists
from utils.errors import DatasetError

words = st.lists(st.text(alphabet="ab-'", min_size=1, max_size=4), min_size=1, max_size=8)


@given(words, words)
def test_pairs_are_the_sorted_set(adjectives: list[str], nouns: list[str]) -> None:
    pairs = WordPairs(adjectives, nouns)
    assert list(pairs) == sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert pairs[-1] == pairs[len(pairs) - 1]


def test_pairs_of_the_real_lists() -> None:
    pytest.importorskip("wonderwords")
    pairs = load_word_lists().pairs
    assert len(pairs) == 6171620
    numbers = range(0, len(pairs), 997)
    assert [pairs[number] for number in numbers] == sorted(pairs[number] for number in numbers)
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_release_is_known_by_its_hash() -> None:
    pytest.importorskip("wonderwords")
    lists = load_word_lists()
    assert lists.provenance["wonderwords"] == "3.0.1"
    assert KNOWN_NOUNS[lists.provenance["nouns"]] == "3.0.1"


def test_own_lists_are_named_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in FILES.values():
        (tmp_path / file).write_text("one\ntwo\n")
    assert load_word_lists(tmp_path).provenance["wonderwords"] == "unknown"
    assert "2 nouns with hash" in caplog.text
    with pytest.raises(DatasetError, match=r"nounlist\.txt does not exist"):
        load_word_lists(tmp_path / "none")
