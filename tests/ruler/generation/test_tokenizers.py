"""Tokenizers of every kind give counts without special tokens, and errors that say what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ruler.generation.generate import generate_rows
from ruler.generation.tokenizers import from_tiktoken, load_tokenizer
from tests.support.ruler_recipes import recipe, reference_folder
from utils.errors import ConfigError

TEXT = "A text of some length, with 12 numbers.\nAnd lines. " * 80


def test_training_leftovers_are_switched_off() -> None:
    """The file asks for truncation at 128 tokens, padding, and [CLS] and [SEP]."""
    tokenizer = load_tokenizer("hf", str(reference_folder() / "tokenizer.json"))
    (count,) = tokenizer.count([TEXT])
    assert count == len(tokenizer.encode(TEXT)) > 1000
    assert tokenizer.count(["one"] * 100) == [1] * 100
    assert tokenizer.splits_words


def test_a_folder_is_as_good_as_its_file(tmp_path: Path) -> None:
    shutil.copy(reference_folder() / "tokenizer.json", tmp_path)
    folder, file = load_tokenizer("hf", str(tmp_path)), load_tokenizer("hf", str(tmp_path / "tokenizer.json"))
    assert folder.fingerprint == file.fingerprint
    assert folder.encode(TEXT) == file.encode(TEXT)


def test_a_folder_that_only_transformers_reads(tmp_path: Path) -> None:
    from transformers import BertTokenizerLegacy  # type: ignore[attr-defined,unused-ignore]

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "text", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerLegacy(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer("hf", str(tmp_path))
    assert tokenizer.count(["a texts", ""]) == [3, 0]
    assert not tokenizer.splits_words


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("hf", "no/such-model", "no tokenizer at no/such-model"),
        ("nemo", "no/such.model", "no sentencepiece model at no/such.model"),
        ("spacy", "x", "unknown tokenizer type 'spacy'"),
    ],
)
def test_missing_tokenizers(kind: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(kind, path)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer that `tokenizers` can read"):
        load_tokenizer("hf", str(tmp_path))


def test_tiktoken() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([number]): number for number in range(256)} | {b"ab": 256, b" a": 257}
    encoding = tiktoken.Encoding("toy", pat_str=r" ?\w+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|end|>": 258})
    tokenizer = from_tiktoken(encoding)
    assert tokenizer.count(["ab a", "<|end|>", ""]) == [2, 7, 0]
    with pytest.raises(ConfigError, match="unknown tiktoken encoding 'nope'"):
        load_tokenizer("openai", "nope")


def test_sentencepiece(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text(TEXT)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "toy"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    wanted = recipe("niah_single_1", 3000, tokenizer=str(tmp_path / "toy.model"), tokenizer_type="nemo", num_samples=2)
    tokenizer = load_tokenizer("nemo", wanted.tokenizer)
    for row in generate_rows(wanted):
        assert row["length"] == len(tokenizer.encode(row["input"] + row["answer_prefix"])) + 128
