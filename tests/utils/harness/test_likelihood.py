"""Log-likelihoods beside a plain forward pass of the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.harness.likelihood import score_continuations
from utils.inference.inference import load_model
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt

TEXTS = [f"{wrap('def f(): return 1')} What?", "no memory", f"a {wrap('x')} b {wrap('y = 2' * 9)}"]


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> tuple[CodeLLaVAModel, Processor]:
    model, _, processor = load_model(checkpoints["lclm"], device="cpu", dtype="float32")
    return model, processor


@torch.inference_mode()
def alone(model: CodeLLaVAModel, prompt: MemoryPrompt, ids: list[int]) -> tuple[float, bool]:
    """One continuation, token by token, all of it read."""
    table = model.decoder.get_input_embeddings()
    rows = torch.cat([model.embed_prompt(prompt), table(torch.tensor(ids))])
    logits = model.decoder(inputs_embeds=rows[None]).logits[0, len(prompt.input_ids) - 1 : -1]
    total = sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, ids, strict=True))
    return total, logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_say_what_each_alone_gets(loaded: tuple[CodeLLaVAModel, Processor], batch_size: int) -> None:
    model, processor = loaded
    prompts = [processor.parse_raw(text) for text in TEXTS]
    greedy = model.generate(prompts, max_new_tokens=5)
    pairs = [
        (prompt, ids)
        for prompt, written in zip(prompts, greedy, strict=True)
        for ids in (written, [*written[:-1], (written[-1] + 1) % 256], [7], [8], [200, 3, 9, 11, 13, 17, 19])
        if ids
    ]
    done: list[int] = []
    scores = score_continuations(model, pairs, batch_size, done.append)
    assert sum(done) == len(pairs)
    expected = [alone(model, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    assert any(is_greedy for _, is_greedy in scores)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-3)


def test_probabilities_of_all_tokens_are_one(loaded: tuple[CodeLLaVAModel, Processor]) -> None:
    model, processor = loaded
    prompt = processor.parse_raw(TEXTS[0])
    pairs = [(prompt, [token]) for token in range(model.decoder.config.vocab_size)]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = model.decoder.register_forward_hook(count)
    try:
        scores = score_continuations(model, pairs, 2)
    finally:
        hook.remove()
    assert float(torch.tensor([score for score, _ in scores]).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert sum(is_greedy for _, is_greedy in scores) == 1
    assert calls == 1, "choices of one token share their prompt's forward pass"


def test_nothing_is_nothing(loaded: tuple[CodeLLaVAModel, Processor]) -> None:
    assert score_continuations(loaded[0], [], 4) == []
