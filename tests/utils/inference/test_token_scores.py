"""Log-probabilities and penalties of drawn tokens, against what one forward pass says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.client.completion import Sampling
from utils.inference.answer_watch import AnswerPiece
from utils.inference.generation import Generator
from utils.inference.inference import load_model
from utils.inference.token_scores import ScoredToken
from utils.model.generate import CountPenalties, continue_rows

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def generator(checkpoints: dict[str, Path]) -> Generator:
    model, tokenizer, _ = load_model(checkpoints["lclm"], device="cpu", dtype="float32")
    return Generator(model.decoder, tokenizer)


@pytest.fixture(scope="module")
def row(generator: Generator) -> torch.Tensor:
    return generator.embed(generator.tokenizer("What is this?")["input_ids"])


@torch.inference_mode()
def logits_of(generator: Generator, row: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] in the places of an answer's ids, from one pass."""
    rows = torch.cat([row, generator.embed(ids)]) if ids else row
    return generator.decoder(inputs_embeds=rows[None]).logits[0, len(row) - 1 :].float()


def drawn(generator: Generator, row: torch.Tensor, sampling: Sampling, count: int = 1) -> list[list[AnswerPiece]]:
    pieces: list[AnswerPiece] = []
    generator.complete([row] * count, sampling, on_piece=pieces.append, logprobs=3)
    return [[piece for piece in pieces if piece.number == number] for number in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_scores_are_the_decoders_own(generator: Generator, row: torch.Tensor, temperature: float) -> None:
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=temperature, top_k=5, frequency_penalty=1.0)
    for pieces in drawn(generator, row, sampling, count=1 if temperature == 0 else 2):
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        said = b"".join(bytes(token.token.bytes or ()) for token in tokens)
        assert said.decode(errors="replace") == text
        assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)
        # A byte is a token here: its id is where the vocabulary has it.
        ids = [identity(generator, token) for token in tokens]
        logprobs = logits_of(generator, row, ids).log_softmax(-1)
        for place, token in enumerate(tokens):
            assert token.token.logprob == pytest.approx(logprobs[place, ids[place]].item(), abs=1e-4)
            assert [likely.logprob for likely in token.likeliest] == pytest.approx(
                logprobs[place].topk(3).values.tolist(), abs=1e-4
            )
        assert tokens


def identity(generator: Generator, token: ScoredToken) -> int:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if token.token.bytes is None:
        return generator.tokenizer.convert_tokens_to_ids(token.token.text)
    return generator.tokenizer.convert_tokens_to_ids(bytes_to_unicode()[token.token.bytes[0]])


def test_a_stop_string_takes_its_tokens_with_it(generator: Generator, row: torch.Tensor) -> None:
    (free,) = drawn(generator, row, Sampling(max_tokens=NEW_TOKENS))
    text = "".join(piece.text for piece in free)
    stop = text[3:5]
    (ended,) = drawn(generator, row, Sampling(max_tokens=NEW_TOKENS, stop=(stop,)))
    tokens = [token for piece in ended for token in piece.tokens]
    whole = [token for piece in free for token in piece.tokens]
    assert tokens == whole[: len(tokens)]
    assert {token.offset for token in tokens} == set(range(text.index(stop)))


def test_count_penalties_take_what_openai_says() -> None:
    scores = torch.zeros(2, 4)
    ids = torch.tensor([[1, 1, 3], [0, 2, 0]])
    penalized = CountPenalties(0.5, 0.25)(ids, scores)
    assert penalized.tolist() == [[0, -1.25, 0, -0.75], [-1.25, 0, -0.75, 0]]
    assert scores.sum() == 0


def test_greedy_answers_under_penalties_are_a_plain_loops(generator: Generator, row: torch.Tensor) -> None:
    def loop(frequency: float, presence: float) -> list[int]:
        ids: list[int] = []
        while len(ids) < NEW_TOKENS and not set(ids) & set(generator.end_ids):
            logits = logits_of(generator, row, ids)[-1].clone()
            for token in set(ids):
                logits[token] -= frequency * ids.count(token) + presence
            ids.append(int(logits.argmax()))
        return ids

    answers = []
    for frequency, presence in ((0.0, 0.0), (1.5, 0.0), (0.0, 2.0), (-1.0, -1.0)):
        (ids,) = continue_rows(
            generator.decoder, [row], max_new_tokens=NEW_TOKENS, end_ids=generator.end_ids, pad_id=0,
            frequency_penalty=frequency, presence_penalty=presence,
        )  # fmt: skip
        assert ids == loop(frequency, presence)
        answers.append(tuple(ids))
    assert len({*answers}) > 1
