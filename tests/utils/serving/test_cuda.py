"""The decoder behind the gateway on a device: the CPU's answers, as a function call and over HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from tests.support.marks import DEVICES
from tests.support.prompts import CHAT, CODE, chat_body
from utils.checkpoint.settings import EncoderSettings
from utils.client.completion import Sampling
from utils.compress.compressor import Compressor
from utils.inference.inference import load_model
from utils.model.markers import wrap
from utils.serving.local_decoder import LocalDecoder

TEXT = f"What is {wrap(CODE)}?"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> tuple[list[int], str]:
    """Greedy ids and text of the whole model on the CPU, in float32, for a chat of one turn."""
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu", dtype="float32")
    prompt = processor.parse_chat([{"role": "user", "content": TEXT}])
    (ids,) = model.generate([prompt], max_new_tokens=NEW_TOKENS)
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_local_decoder_answers_as_on_the_cpu(
    checkpoints: dict[str, Path], expected: tuple[list[int], str], device: str, dtype: str
) -> None:
    compressor = Compressor.load(checkpoints["lclm"], settings=EncoderSettings(device=device, dtype=dtype))
    decoder = LocalDecoder.load(compressor.files, EncoderSettings(device=device, dtype=compressor.dtype))
    embeds = compressor.compress([compressor.parse_chat([{"role": "user", "content": TEXT}])])[0]
    pieces: list[str] = []
    rows = embeds.values_TD.to(device)
    answer = decoder.answer(rows, Sampling(max_tokens=NEW_TOKENS, temperature=0), pieces.append)
    assert 0 < answer.completion_tokens <= NEW_TOKENS
    assert rows.dtype == getattr(torch, dtype)
    if dtype == "float32":
        assert answer.text == "".join(pieces) == expected[1]


@pytest.mark.parametrize("device", DEVICES)
def test_the_gateway_answers_as_on_the_cpu(
    checkpoints: dict[str, Path], expected: tuple[list[int], str], device: str
) -> None:
    from tests.support import local_gateway  # skips where what it is made of is not installed

    compressor = Compressor.load(checkpoints["lclm"], settings=EncoderSettings(device=device, dtype="float32"))
    body = chat_body(TEXT, max_tokens=NEW_TOKENS, temperature=0)
    with local_gateway.running(compressor, device=device) as url, httpx.Client(base_url=url, timeout=60) as client:
        got = client.post(CHAT, json=body).json()
    assert got["choices"][0]["message"]["content"] == expected[1]
