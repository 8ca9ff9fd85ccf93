"""The published functions agree with the parser and the model behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from general.processor_v2 import compress, parse_prompt, parse_raw_prompt
from utils.errors import PromptError, SpliceError
from utils.inference.inference import load_model

TEXT = "a<|memory_start|>def f(): return 1<|memory_end|><|memory_start|>x<|memory_end|>b"


def test_parse_and_compress(checkpoints: dict[str, Path]) -> None:
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu")
    encoder_tokenizer = processor.tokenizers.encoder
    messages = [{"role": "user", "content": TEXT}]
    for prompt, parsed in (
        (processor.parse_raw(TEXT), parse_raw_prompt(TEXT, tokenizer, encoder_tokenizer, 4)),
        (processor.parse_chat(messages), parse_prompt(messages, tokenizer, encoder_tokenizer, 4)),
    ):
        ids, codes, places = parsed
        assert ids == prompt.input_ids
        assert codes == ["def f(): return 1", "x"]
        assert places == [(span.start, span.stop) for span in prompt.spans]
        with torch.inference_mode():
            torch.testing.assert_close(compress(ids, codes, places, model), model.embed_prompt(prompt))


def test_no_memory(checkpoints: dict[str, Path]) -> None:
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu")
    ids, codes, places = parse_raw_prompt("plain", tokenizer, processor.tokenizers.encoder, 4)
    assert (codes, places) == ([], [])
    assert compress(ids, codes, places, model).shape == (5, model.decoder.config.hidden_size)


def test_disagreement_is_refused(checkpoints: dict[str, Path]) -> None:
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu")
    ids, codes, places = parse_raw_prompt(TEXT, tokenizer, processor.tokenizers.encoder, 2)
    with pytest.raises(SpliceError, match=r"span 0 has 9 placeholders but 5 latents: .* one --chunk-size"):
        compress(ids, codes, places, model)
    with pytest.raises(SpliceError, match="1 codes but 2 code positions"):
        compress(ids, codes[:1], places, model)
    with pytest.raises(PromptError, match="code 1 has no encoder tokens"):
        compress(ids, [codes[0], ""], places, model)
