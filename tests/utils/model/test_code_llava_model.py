"""The whole model: loss, gradients, generation in batches, room, and memory that runs out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from tests.support.marks import DEVICES
from tests.support.reference import next_token_losses
from tests.support.tiny import DECODER_WIDTH, MAX_POSITIONS, make_model, tokenizers
from utils.errors import ConfigError, PromptError
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.config import CompressionConfig
from utils.model.generate import pad_left
from utils.model.markers import MEMORY_END, MEMORY_START
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt

CONFIG = CompressionConfig(chunk_size=4, window=16)
PROCESSOR = Processor(tokenizers=tokenizers(), chunk_size=4)
TEXTS = [
    f"Explain {MEMORY_START}def add(a, b): return a + b{MEMORY_END}!",
    "no memory",
    f"{MEMORY_START}x{MEMORY_END}{MEMORY_START}x{MEMORY_END} and a much longer text around two equal spans",
]
PROMPTS = [PROCESSOR.parse_raw(text) for text in TEXTS]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> CodeLLaVAModel:
    return make_model(CONFIG, decoder_family=request.param)


def expected_embeds(model: CodeLLaVAModel, prompt: MemoryPrompt) -> torch.Tensor:
    """Row by row: a token's embedding, or the next latent."""
    latents = iter(torch.cat([*model.encode_memory(prompt.spans), torch.empty(0, DECODER_WIDTH)]))
    table = model.decoder.get_input_embeddings().weight
    inside = {row for span in prompt.spans for row in range(span.start, span.stop)}
    return torch.stack([next(latents) if i in inside else table[token] for i, token in enumerate(prompt.input_ids)])


@torch.inference_mode()
def test_prompt_embeddings(model: CodeLLaVAModel) -> None:
    together = model.embed_prompts(PROMPTS)
    for prompt, embeds in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(embeds, expected_embeds(model, prompt), atol=1e-5, rtol=0)
        torch.testing.assert_close(embeds, model.embed_prompt(prompt), atol=1e-5, rtol=0)


def test_gradients_reach_every_part() -> None:
    model = make_model(CONFIG).train()
    sum(next_token_losses(model, PROCESSOR, prompt, "ok").mean() for prompt in PROMPTS).backward()
    for part in (model.memory_encoder.adapter, model.code_chunker.encoder, model.decoder):
        without = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []


def test_batched_greedy_generation_is_that_of_one_by_one(model: CodeLLaVAModel) -> None:
    together = model.generate(PROMPTS, max_new_tokens=10)
    assert together == [model.generate([prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS[::-1], max_new_tokens=10) == together[::-1]
    assert model.generate([], max_new_tokens=10) == []


@pytest.mark.parametrize("device", DEVICES)
def test_generation_on_a_device_is_the_cpus_batched_and_single(model: CodeLLaVAModel, device: str) -> None:
    moved = copy.deepcopy(model).to(device)
    expected = model.generate(PROMPTS, max_new_tokens=10)
    assert moved.generate(PROMPTS, max_new_tokens=10) == expected
    assert [moved.generate([prompt], max_new_tokens=10)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_bfloat16_on_a_device_computes_nearly_the_same(model: CodeLLaVAModel, device: str) -> None:
    """Ids may differ where two are nearly as likely; prompt rows, and what follows in a batch and alone, may not."""
    moved = copy.deepcopy(model).to(device, torch.bfloat16)
    for embeds, expected in zip(moved.embed_prompts(PROMPTS), model.embed_prompts(PROMPTS), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(embeds.float().cpu(), expected, atol=4e-2 * scale, rtol=0)
    rows, mask = pad_left(moved.embed_prompts(PROMPTS))
    together = moved.decoder(inputs_embeds=rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    for logits, prompt in zip(together.logits[:, -1], PROMPTS, strict=True):
        alone = moved.decoder(inputs_embeds=moved.embed_prompt(prompt)[None]).logits[0, -1]
        torch.testing.assert_close(logits, alone, atol=4e-2 * float(alone.abs().max()), rtol=0)
    assert all(1 <= len(ids) <= 10 for ids in moved.generate(PROMPTS, max_new_tokens=10))


def test_padding_does_not_hide_tokens_from_the_repetition_penalty(model: CodeLLaVAModel) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 10, "repetition_penalty": 5.0}
    together = model.generate(PROMPTS, **settings)
    assert together == [model.generate([prompt], **settings)[0] for prompt in PROMPTS]
    assert together != model.generate(PROMPTS, max_new_tokens=10)
    model.decoder.generation_config.repetition_penalty = 5.0
    try:
        assert model.generate(PROMPTS, max_new_tokens=10) == together
    finally:
        model.decoder.generation_config.repetition_penalty = None


@torch.inference_mode()
def test_generation_is_greedy_decoding_without_a_cache(model: CodeLLaVAModel) -> None:
    prompt = PROMPTS[0]
    embeds, table, ids = model.embed_prompt(prompt), model.decoder.get_input_embeddings().weight, []
    for _ in range(8):
        logits = model.decoder(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        embeds = torch.cat([embeds, table[ids[-1]][None]])
    expected = ids[: ids.index(model.eos_token_ids[0])] if model.eos_token_ids[0] in ids else ids
    assert model.generate([prompt], max_new_tokens=8)[0] == expected


def test_generation_ends_before_its_end_token() -> None:
    model = make_model(CONFIG)
    model.eos_token_ids = ()
    free = model.generate(PROMPTS, max_new_tokens=10)
    model.eos_token_ids = (free[0][4],)
    ended = model.generate(PROMPTS, max_new_tokens=10)
    for before, after in zip(free, ended, strict=True):
        cut = before.index(free[0][4]) if free[0][4] in before else len(before)
        assert after == before[:cut]


def test_sampling_is_seeded() -> None:
    model = make_model(CONFIG)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(PROMPTS, max_new_tokens=12, do_sample=True, temperature=2.0))
    assert draws[0] == draws[1] != draws[2]


def test_a_prompt_without_room_is_refused_with_both_counts(model: CodeLLaVAModel) -> None:
    long = PROCESSOR.parse_raw("x" * 500)
    model.check_room([long], MAX_POSITIONS - 500)
    with pytest.raises(PromptError, match=r"prompt 1.* 500 .* 20 .* 512 "):
        model.generate([PROMPTS[0], long], max_new_tokens=20)


def test_generation_streams_and_reads_the_prompt_once(model: CodeLLaVAModel) -> None:
    rows: list[int] = []
    pieces: list[int] = []

    class Watch(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        rows.append(given.shape[1])

    hook = model.decoder.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    (answer,) = model.generate(PROMPTS[:1], max_new_tokens=5, min_new_tokens=5, streamer=Watch())
    hook.remove()
    assert pieces == [*answer, -1]
    assert len(answer) == 5
    # The prompt's keys and values are kept: each further token is one row.
    assert rows == [len(PROMPTS[0].input_ids), 1, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=["cuda", "cpu"],
)
def test_memory_that_runs_out_names_the_batch_and_the_flag(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG, batch_tokens=64)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model.code_chunker.encoder, "forward", fail)
        with pytest.raises(ConfigError, match=r" 64 tokens .* --batch-tokens"):
            model.embed_prompts(PROMPTS)
    monkeypatch.setattr(model.decoder, "generate", fail)
    with pytest.raises(ConfigError, match=r"3 prompts .* --batch-size"):
        model.generate(PROMPTS, max_new_tokens=8)


def test_other_failures_keep_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(model.code_chunker.encoder, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        model.embed_prompts(PROMPTS)


@torch.inference_mode()
def test_published_names(model: CodeLLaVAModel) -> None:
    assert model.llm_model is model.decoder
    assert model.code_chunker is model.memory_encoder.chunker
    assert model.config is model.code_chunker.config
