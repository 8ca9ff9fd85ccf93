"""The generate loop: batches, stop strings, streaming, limits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import CHATML, byte_tokenizer
from utils.checkpoint.pair import framing_tokens
from utils.client.completion import Sampling
from utils.errors import PromptError
from utils.inference.generation import Generator, batches_by_length
from utils.inference.inference import load_model
from utils.inference.text_pieces import TextPieces, decode_answer
from utils.model.markers import MARKERS


@pytest.fixture(scope="module")
def generator(checkpoints: dict[str, Path]) -> Generator:
    model, tokenizer, _ = load_model(checkpoints["lclm"], device="cpu", dtype="float32")
    return Generator(model.decoder, tokenizer)


@pytest.fixture(scope="module")
def rows(generator: Generator) -> list[torch.Tensor]:
    texts = ("What is this?", "A longer prompt, for padding.", "x")
    return [generator.embed(generator.tokenizer(text)["input_ids"]) for text in texts]


@given(lengths=st.lists(st.integers(1, 50), max_size=40), batch_size=st.integers(1, 5), window=st.integers(1, 4))
def test_batches_hold_each_prompt_once_and_none_waits_long(lengths: list[int], batch_size: int, window: int) -> None:
    batches = batches_by_length(lengths, batch_size, window)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) and 1 <= len(batch) <= batch_size for batch in batches)
    done = 0
    for batch in batches:
        assert max(batch) < done // (window * batch_size) * window * batch_size + window * batch_size
        done += len(batch)


def test_batches_are_of_similar_lengths() -> None:
    assert batches_by_length((9, 1, 8, 2, 7, 3), 2) == [[1, 3], [4, 5], [0, 2]]


def test_a_batch_says_what_each_prompt_alone_gets(generator: Generator, rows: list[torch.Tensor]) -> None:
    sampling = Sampling(max_tokens=12)
    together = generator.complete(rows, sampling)
    assert together == [generator.complete([row], sampling)[0] for row in rows]
    assert [completion.prompt_tokens for completion in together] == [len(row) for row in rows]
    assert generator.complete([], sampling) == []


def test_stop_strings_end_each_answer_of_a_batch(generator: Generator, rows: list[torch.Tensor]) -> None:
    free = generator.complete(rows, Sampling(max_tokens=12))
    stop = free[0].text[3:5]
    ended = generator.complete(rows, Sampling(max_tokens=12, stop=(stop,)))
    for before, after in zip(free, ended, strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at])
        assert after.finish_reason == ("stop" if at >= 0 else before.finish_reason)
    assert ended[0].completion_tokens < 12


def test_pieces_make_the_text_and_a_cancelled_answer_ends(generator: Generator, rows: list[torch.Tensor]) -> None:
    pieces: list[str] = []
    completion = generator.complete(
        rows[:1], Sampling(max_tokens=12), on_piece=lambda piece: pieces.append(piece.text)
    )[0]
    assert completion.text == "".join(pieces) == generator.complete(rows[:1], Sampling(max_tokens=12))[0].text
    cancelled = threading.Event()
    early = generator.complete(
        rows[:1], Sampling(max_tokens=12), on_piece=lambda piece: cancelled.set(), cancelled=cancelled
    )[0]
    assert early.completion_tokens < 12


def test_draws_repeat_with_their_seed(generator: Generator, rows: list[torch.Tensor]) -> None:
    def draw(**values: Any) -> list[str]:
        sampling = Sampling(max_tokens=12, temperature=2.0, **values)
        return [completion.text for completion in generator.complete(rows, sampling)]

    assert draw(seed=3) == draw(seed=3) != draw(seed=4)


def test_what_does_not_fit_is_refused(generator: Generator, rows: list[torch.Tensor]) -> None:
    room = generator.max_rows
    assert room is not None
    with pytest.raises(PromptError, match=f"prompt 0 needs {len(rows[0])} rows .* {room} positions"):
        generator.complete(rows, Sampling(max_tokens=room))
    alone = generator.complete(rows[:1], Sampling(), min_new_tokens=2)[0]
    assert alone.completion_tokens is not None
    assert alone.completion_tokens + len(rows[0]) <= room
    with pytest.raises(PromptError, match="no tokens"):
        generator.embed([])
    with pytest.raises(PromptError, match="token id 99999"):
        generator.embed([1, 99999])


def test_only_what_frames_a_turn_is_hidden(generator: Generator) -> None:
    tokenizer = byte_tokenizer(markers=True, template=CHATML, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKERS, "<filename>"]})
    hidden = framing_tokens(generator.decoder, tokenizer)
    text = "<|endoftext|>a<filename>b<|im_end|><|im_start|>" + "".join(MARKERS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, ids, hidden) == "a<filename>b"
    pieces = TextPieces(tokenizer, hidden)
    assert "".join([*map(pieces.add, ids), pieces.finish()]) == "a<filename>b"


def test_text_is_given_out_once_it_is_certain(generator: Generator) -> None:
    def pieces(text: str, *stop: str) -> list[str]:
        reader = TextPieces(generator.tokenizer, generator.hidden_ids, stop)
        told = [reader.add(token) for token in generator.tokenizer(text)["input_ids"]]
        return [*told, reader.finish()]

    assert pieces("aé") == ["a", "", "é", ""]
    assert pieces("abcabd", "abd") == ["", "", "abc", "", "", "", ""]
    assert pieces("xab", "abd") == ["x", "", "", "ab"]
    assert "".join(pieces("one END two", "END", "two")) == "one "
    assert "".join(pieces("naïve 文字 🙂 text")) == "naïve 文字 🙂 text"
