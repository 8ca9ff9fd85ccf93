"""The way without our code in lm-eval: its models for OpenAI-compatible servers in front of our gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model

from tests.support import local_gateway
from utils.checkpoint.settings import EncoderSettings
from utils.compress.compressor import Compressor

# What the gateway calls the checkpoint: its folder.
MODEL = "lclm"
# So that RULER's shortest prompts fit the tiny decoder.
CHUNK_SIZE = 16
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path]) -> Iterator[str]:
    settings = EncoderSettings(device="cpu", dtype="float32")
    compressor = Compressor.load(checkpoints[MODEL], settings=settings, chunk_size=CHUNK_SIZE)
    with local_gateway.running(compressor) as address:
        yield address


def said(results: dict[str, Any], task: str) -> list[str]:
    return [sample["resps"][0][0] for sample in results["samples"][task]]


@pytest.mark.slow
@pytest.mark.parametrize("num_concurrent", [1, 3])
def test_chats_are_answered_as_by_our_model(run_tasks: Run, url: str, num_concurrent: int) -> None:
    model = get_model("local-chat-completions").create_from_arg_obj(
        {"model": MODEL, "base_url": f"{url}/v1/chat/completions", "num_concurrent": num_concurrent}
    )
    metadata = {"num_samples": 4, "memory_tokens": [40, 60]}
    settings: dict[str, Any] = {"metadata": metadata, "chat": True, "gen_kwargs": {"max_gen_toks": 8}}
    through = said(run_tasks("memory_lookup", model=model, **settings), "memory_lookup")
    assert through == said(run_tasks("memory_lookup", chunk_size=CHUNK_SIZE, **settings), "memory_lookup")
    assert any(through)


@pytest.mark.slow
def test_texts_are_continued_as_by_our_model(run_tasks: Run, url: str) -> None:
    model = get_model("local-completions").create_from_arg_obj(
        {"model": MODEL, "base_url": f"{url}/v1/completions", "tokenizer_backend": "None"}
    )
    metadata = {"max_seq_lengths": [1010], "num_samples": 2}
    settings: dict[str, Any] = {"metadata": metadata, "gen_kwargs": {"max_gen_toks": 8, "until": ["\n"]}}
    through = said(run_tasks("memory_niah_single_1", model=model, **settings), "memory_niah_single_1")
    here = run_tasks("memory_niah_single_1", chunk_size=CHUNK_SIZE, **settings)
    assert through == said(here, "memory_niah_single_1")
    assert any(through)
