"""The decoder behind the gateway on a device: the CPU's answers, over HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support import local_gateway  # skips where what it is made of is not installed
from tests.support.marks import DEVICES
from tests.support.prompts import CHAT, CODE, chat_body
from utils.checkpoint.settings import EncoderSettings
from utils.compress.compressor import Compressor
from utils.inference.inference import load_model
from utils.model.markers import wrap

TEXT = f"What is {wrap(CODE)}?"
NEW_TOKENS = 24


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gateway_answers_as_on_the_cpu(checkpoints: dict[str, Path], device: str, dtype: str) -> None:
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu", dtype="float32")
    (ids,) = model.generate([processor.parse_chat([{"role": "user", "content": TEXT}])], max_new_tokens=NEW_TOKENS)
    compressor = Compressor.load(checkpoints["lclm"], settings=EncoderSettings(device=device, dtype=dtype))
    body = chat_body(TEXT, max_tokens=NEW_TOKENS, temperature=0)
    with local_gateway.running(compressor, device=device) as url, httpx.Client(base_url=url, timeout=60) as client:
        got = client.post(CHAT, json=body).json()
    assert 0 < got["usage"]["completion_tokens"] <= NEW_TOKENS
    if dtype == "float32":
        assert got["choices"][0]["message"]["content"] == tokenizer.decode(ids, skip_special_tokens=True)
