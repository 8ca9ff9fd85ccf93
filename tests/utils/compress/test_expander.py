"""Memory that stays text in part: with every policy, through `Compressor`, and from an encoded corpus."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.compress.policies.registry import POLICIES
from utils.compress.prompt_embeds import load_prompt_embeds, save_prompt_embeds
from utils.compress.select import Expansion
from utils.corpus.__main__ import main as encode_corpus
from utils.corpus.reader import EncodedCorpus
from utils.errors import ConfigError, DatasetError, PromptError
from utils.model.markers import wrap

CODE = "def area(w, h):\n    return w * h\n\n\nLIMIT = 40\n\ndef greet(name):\n    return name\n"
PROMPT = wrap(CODE) + "What is LIMIT?"


@pytest.fixture
def compressor(checkpoints: dict[str, Path]) -> Compressor:
    return Compressor.load(checkpoints["lclm"], settings=ON_CPU)


def shown(compressor: Compressor, text: str, expansion: Expansion) -> list[str]:
    """What of each span stays text."""
    prompt = compressor.expand(compressor.parse_raw(text), expansion)
    return ["".join(span.text[a:b] for segment in span.segments for a, b in segment.chars) for span in prompt.spans]


def test_what_the_prompt_asks_for_stays_text(compressor: Compressor) -> None:
    assert "LIMIT = 40\n" in shown(compressor, PROMPT, Expansion(tokens=12))[0]
    assert "greet" in shown(compressor, PROMPT, Expansion(tokens=20, query="greet"))[0]
    # One budget for all spans.
    first, second = shown(compressor, wrap("x = 1\n") + wrap(CODE) + "What is LIMIT?", Expansion(share=Fraction(1, 7)))
    assert (first, "LIMIT = 40\n" in second) == ("", True)


def test_a_second_question_encodes_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with LatentCache.open(tmp_path) as cache:
        compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)
        asked = [compressor.parse_raw(wrap(CODE) + question) for question in ("LIMIT?", "What does area return?")]
        first, second = (compressor.compress([prompt], Expansion(tokens=20))[0] for prompt in asked)
        assert first.stats.cached_tokens == 0
        assert second.stats.cached_tokens == second.stats.memory_tokens == len(CODE)
        assert first.expanded != second.expanded


@pytest.mark.parametrize("expansion", [Expansion(tokens=0), Expansion(share=Fraction(0)), Expansion(policy="none")])
def test_no_budget_changes_no_bit(compressor: Compressor, expansion: Expansion) -> None:
    prompt = compressor.parse_raw(PROMPT)
    without, off = compressor.compress([prompt])[0], compressor.compress([prompt], expansion)[0]
    assert torch.equal(without.values_TD, off.values_TD)
    assert (off.spans, off.stats, off.expanded) == (without.spans, without.stats, ())


def test_all_is_the_text_between_its_markers(compressor: Compressor) -> None:
    embeds = compressor.compress([compressor.parse_raw(PROMPT)], Expansion(policy="all"))[0]
    ids = compressor.processor.tokenizers.decoder(PROMPT)["input_ids"]
    plain = compressor.parse_raw("x")
    rows = compressor.embed(type(plain)(input_ids=ids, spans=()), []).values_TD
    assert torch.equal(embeds.values_TD, rows)
    assert (embeds.stats.num_latents, embeds.stats.text_rows, embeds.stats.ratio) == (0, len(CODE), 1.0)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("none", "all", "answer")])
def test_policies_keep_the_budget_and_their_choice(compressor: Compressor, policy: str) -> None:
    expansion = Expansion(tokens=30, policy=policy)
    once = shown(compressor, PROMPT, expansion)
    assert once == shown(compressor, PROMPT, expansion)
    assert 0 < len(once[0]) <= 30


def test_latents_are_counted_beside_text(compressor: Compressor) -> None:
    embeds = compressor.compress([compressor.parse_raw(PROMPT)], Expansion(tokens=12))[0]
    ((start, stop),) = embeds.spans
    assert embeds.stats.num_latents + embeds.stats.text_rows == stop - start
    assert embeds.stats.ratio == len(CODE) / (stop - start)
    assert embeds.stats.prompt_tokens == len(embeds.values_TD)


def test_control_tokens_of_the_decoder_stay_data(compressor: Compressor) -> None:
    text = "LIMIT = 1\nLIMIT = '<|im_end|>'\n"
    assert shown(compressor, wrap(text) + "LIMIT?", Expansion(policy="all")) == ["LIMIT = 1\n"]


def test_a_sidecar_tells_what_stayed_text(compressor: Compressor, tmp_path: Path) -> None:
    embeds = compressor.compress([compressor.parse_raw(PROMPT)], Expansion(tokens=12))[0]
    save_prompt_embeds(tmp_path / "rows.npy", embeds)
    assert load_prompt_embeds(tmp_path / "rows.npy").expanded == embeds.expanded
    sidecar = json.loads((tmp_path / "rows.json").read_text())
    ((begin, end),) = sidecar["expanded"][0]["chars"]
    assert "LIMIT = 40" in CODE[begin:end]
    sidecar["expanded"][0]["rows"] = [0, 10_000]
    (tmp_path / "rows.json").write_text(json.dumps(sidecar))
    with pytest.raises(DatasetError, match="in no span"):
        load_prompt_embeds(tmp_path / "rows.npy")


def test_latents_of_a_corpus_take_text_between_them(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "code.py").write_text(CODE)
    flags = ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert encode_corpus([str(tmp_path / "in"), *flags]) == 0
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    expansion = Expansion(tokens=12)
    prompt = compressor.expand(compressor.parse_raw(PROMPT), expansion)
    with EncodedCorpus.open(tmp_path / "out") as corpus:
        embeds = compressor.embed(prompt, [corpus.encoded(span) for span in prompt.spans])
    fresh = compressor.compress([compressor.parse_raw(PROMPT)], expansion)[0]
    torch.testing.assert_close(embeds.values_TD, fresh.values_TD, atol=1e-5, rtol=0)
    assert embeds.expanded == fresh.expanded


def test_a_prompt_that_text_makes_too_long(compressor: Compressor) -> None:
    prompt = compressor.parse_raw(wrap("x = 1\n" * 100) + "x?")
    assert len(prompt.input_ids) < 512
    with pytest.raises(PromptError, match="512 positions"):
        compressor.compress([prompt], Expansion(policy="all"))


def test_nothing_to_select_by(compressor: Compressor) -> None:
    with pytest.raises(PromptError, match="--expand-query"):
        compressor.expand(compressor.parse_raw(wrap(CODE)), Expansion(tokens=10))
    assert shown(compressor, wrap(CODE), Expansion(tokens=12, query="LIMIT"))[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": -1}, "negative"),
        ({"share": Fraction(3, 2)}, "0 to 1"),
        ({"tokens": 1, "share": Fraction(1, 2)}, "not both"),
        ({}, "needs a budget"),
        ({"tokens": 1, "policy": "best"}, "choose one of bm25"),
        ({"tokens": 1, "query": " "}, "empty"),
    ],
)
def test_settings_that_do_not_go(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Expansion(**settings)


def test_the_right_answer_is_for_those_who_know_it(compressor: Compressor) -> None:
    with pytest.raises(ConfigError, match="answer"):
        compressor.expand(compressor.parse_raw(PROMPT), Expansion(tokens=10, policy="answer"))


def test_the_next_question_does_not_tokenise_the_memory_again(checkpoints: dict[str, Path]) -> None:
    compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU)
    prompts = [compressor.parse_raw(wrap(CODE) + text) for text in ("LIMIT?", "greet?")]
    first = compressor.expand(prompts[0], Expansion(tokens=20))
    encoder = compressor.processor.tokenizers.encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(encoder), "backend_tokenizer", None)
        assert compressor.expand(prompts[0], Expansion(tokens=20)) == first
        assert compressor.expand(prompts[1], Expansion(tokens=20)) != first
        with pytest.raises(ConfigError, match="fast tokenizer"):
            compressor.expand(compressor.parse_raw(wrap("another memory") + "x?"), Expansion(tokens=20))
