"""What the published programs computed, in both layouts: ids and positions exactly, embeddings to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from general import processor_v2
from utils.checkpoint.convert.conversion import convert
from utils.checkpoint.layout import CODE_LLAVA, LCLM
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import EncoderSettings
from utils.compress.compressor import Compressor
from utils.inference.inference import load_model

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())
# None is the packed default.
ATTENTION = (None, "eager", "sdpa")
TOLERANCE = 1e-5


def read_case(case: str) -> tuple[dict[str, Any], int]:
    """The prompts of a case, by name, and its chunk size."""
    meta = json.loads((GOLDEN / case / "expected" / "meta.json").read_text(encoding="utf-8"))
    size = meta.get("chunk_size") or meta["model_config"]["compression_ratio"]
    return meta["prompts"], size


def expected_embeds(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / case / "expected" / f"{name}.npy"))


def parse(parser: Any, name: str, text: str) -> Any:
    """Parse a golden prompt with anything that has `parse_raw` and `parse_chat`."""
    return parser.parse_raw(text) if name.endswith(".raw") else parser.parse_chat([{"role": "user", "content": text}])


def assert_close(values: torch.Tensor, expected: torch.Tensor) -> None:
    assert values.shape == expected.shape
    assert (values.float() - expected).abs().max() <= TOLERANCE


def test_there_are_cases_in_both_layouts() -> None:
    layouts = {find_checkpoint(GOLDEN / case, chunk_size=read_case(case)[1]).layout.name for case in CASES}
    assert layouts == {CODE_LLAVA.name, LCLM.name}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", CASES)
def test_compressor(case: str, attention: str | None) -> None:
    prompts, size = read_case(case)
    compressor = Compressor.load(
        GOLDEN / case,
        settings=EncoderSettings(device="cpu", dtype="float32", attn_implementation=attention),
        chunk_size=size,
    )
    parsed = {name: parse(compressor, name, row["text"]) for name, row in prompts.items()}
    for name, row in prompts.items():
        if "input_ids" in row:
            assert parsed[name].input_ids == row["input_ids"], name
            assert [span.text for span in parsed[name].spans] == row["codes"]
            assert [[span.start, span.stop] for span in parsed[name].spans] == row["code_positions"]
    together = compressor.compress(list(parsed.values()))
    for (name, prompt), embeds in zip(parsed.items(), together, strict=True):
        assert_close(embeds.values_TD, expected_embeds(case, name))
        if attention is None:
            assert_close(compressor.compress([prompt])[0].values_TD, expected_embeds(case, name))


@pytest.mark.parametrize("attention", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ATTENTION[1:])])
@pytest.mark.parametrize("case", CASES)
def test_model_embeds_and_greedy_ids(case: str, attention: str | None) -> None:
    prompts, size = read_case(case)
    model, _, processor = load_model(
        GOLDEN / case, device="cpu", chunk_size=size, attn_implementation=attention, dtype="float32"
    )
    # The published programs were run for twelve tokens whatever came.
    model.eos_token_ids = ()
    model.decoder.generation_config.eos_token_id = None
    parsed = {name: parse(processor, name, row["text"]) for name, row in prompts.items()}
    with torch.inference_mode():
        for name, embeds in zip(parsed, model.embed_prompts(list(parsed.values())), strict=True):
            assert_close(embeds, expected_embeds(case, name))
    generated = model.generate(list(parsed.values()), max_new_tokens=12)
    assert generated == [row["greedy_ids"] for row in prompts.values()]


@pytest.mark.parametrize("case", CASES)
def test_published_functions(case: str) -> None:
    prompts, size = read_case(case)
    model, tokenizer, processor = load_model(GOLDEN / case, device="cpu", chunk_size=size, dtype="float32")
    encoder_tokenizer = processor.tokenizers.encoder
    for name, row in prompts.items():
        if name.endswith(".raw"):
            ids, codes, places = processor_v2.parse_raw_prompt(row["text"], tokenizer, encoder_tokenizer, size)
        else:
            messages = [{"role": "user", "content": row["text"]}]
            ids, codes, places = processor_v2.parse_prompt(messages, tokenizer, encoder_tokenizer, size)
        if "input_ids" in row:
            assert (ids, codes, [list(place) for place in places]) == (
                row["input_ids"],
                row["codes"],
                row["code_positions"],
            )
        assert_close(processor_v2.compress(ids, codes, places, model), expected_embeds(case, name))


@pytest.mark.parametrize("case", CASES)
def test_the_other_layout_gives_the_same(case: str, tmp_path: Path) -> None:
    prompts, size = read_case(case)
    other = CODE_LLAVA if find_checkpoint(GOLDEN / case, size).layout is LCLM else LCLM
    convert(GOLDEN / case, tmp_path / "other", layout=other, chunk_size=size)
    assert find_checkpoint(tmp_path / "other").layout is other
    # Stored as bfloat16, computed as float32: the copy says everything that decides a latent.
    copy = Compressor.load(tmp_path / "other", settings=EncoderSettings(device="cpu", dtype="float32"))
    parsed = {name: parse(copy, name, row["text"]) for name, row in prompts.items()}
    for (name, prompt), embeds in zip(parsed.items(), copy.compress(list(parsed.values())), strict=True):
        assert prompt.input_ids == prompts[name].get("input_ids", prompt.input_ids)
        assert_close(embeds.values_TD, expected_embeds(case, name))
