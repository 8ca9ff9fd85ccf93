"""Expanding: the chosen characters stand in the prompt as text, in place, and only chunks inside them lose a latent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tokenizers
from utils.errors import ConfigError, SpliceError
from utils.model.expand import expand, token_offsets
from utils.model.markers import wrap
from utils.model.prompt import MemoryLimit, MemoryPrompt, PromptTokenizers, parse_chat_prompt, parse_raw_prompt
from utils.model.splice import splice_spans

TOKENIZERS = tokenizers()
# Of one byte a token: characters of several bytes have several tokens, and chunks end inside of them.
TEXTS = st.text(st.sampled_from("ab \n\r\té漢🦙"), min_size=1, max_size=60)


def offsets_of(prompt: MemoryPrompt) -> list[np.ndarray]:
    return [token_offsets(TOKENIZERS.encoder, span.text, len(span.token_ids)) for span in prompt.spans]


def expanded(prompt: MemoryPrompt, *chosen: list[tuple[int, int]]) -> MemoryPrompt:
    return expand(prompt, chosen, offsets_of(prompt), TOKENIZERS)


@st.composite
def cases(draw: Any) -> tuple[list[str], list[list[tuple[int, int]]], int]:
    """Memories, ranges of their characters that do not touch, and a chunk size."""
    texts, chosen = draw(st.lists(TEXTS, min_size=1, max_size=3)), []
    for text in texts:
        cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
        chosen.append(list(zip(cuts[::2], cuts[1::2], strict=False)))
    return texts, chosen, draw(st.sampled_from([1, 2, 3, 5, 16]))


@given(cases())
def test_text_and_latents_stand_where_they_belong(case: tuple[list[str], list[list[tuple[int, int]]], int]) -> None:
    texts, chosen, size = case
    plain = parse_raw_prompt("?".join(map(wrap, texts)) + "!", TOKENIZERS, size)
    prompt = expanded(plain, *chosen)
    marks = TOKENIZERS.markers
    outside, at = [], 0
    for span in (*prompt.spans, None):
        outside += prompt.input_ids[at : span.start if span else None]
        at = span.stop if span else at
    assert [i for i in plain.input_ids if i != marks.memory] == outside
    for span, text, ranges, offsets in zip(prompt.spans, texts, chosen, offsets_of(plain), strict=True):
        assert prompt.input_ids[span.start - 1] == marks.start
        assert prompt.input_ids[span.stop] == marks.end
        shown = "".join(text[a:b] for a, b in ranges)
        rows = [i for i in prompt.input_ids[span.start : span.stop] if i != marks.memory]
        assert TOKENIZERS.decoder.decode(rows) == shown
        assert [pair for segment in span.segments for pair in segment.chars] == ranges
        kept = [chunk + row - first for first, stop, chunk in span.latent_runs for row in range(first, stop)]
        assert all(prompt.input_ids[row] == marks.memory for a, b, _ in span.latent_runs for row in range(a, b))
        chunks = [offsets[at : at + size] for at in range(0, len(offsets), size)]
        inside = [any(a <= c[0, 0] and c[-1, 1] <= b for a, b in ranges) for c in chunks]
        assert kept == [number for number, gone in enumerate(inside) if not gone]
        assert span.num_latents == len(kept)
        assert span.num_chunks == len(chunks)
        for segment in span.segments:
            begin, end = segment.chars[0][0], segment.chars[-1][1]
            for first, _, chunk in span.latent_runs:
                # A latent before the text begins before it, one behind it ends behind it.
                assert chunks[chunk][0, 0] < begin if first < segment.rows[0] else chunks[chunk][-1, 1] > end


@given(cases())
def test_latents_of_expanded_chunks_are_left_out(case: tuple[list[str], list[list[tuple[int, int]]], int]) -> None:
    texts, chosen, size = case
    prompt = expanded(parse_raw_prompt("".join(map(wrap, texts)), TOKENIZERS, size), *chosen)
    embeds = torch.arange(len(prompt.input_ids), dtype=torch.float32)[:, None].repeat(1, 2)
    latents = [
        1000 * (1 + n) + torch.arange(s.num_chunks).float()[:, None].repeat(1, 2) for n, s in enumerate(prompt.spans)
    ]
    spliced = splice_spans(embeds, latents, prompt.spans)[:, 0].tolist()
    is_latent = [i == TOKENIZERS.markers.memory for i in prompt.input_ids]
    assert [value >= 1000 for value in spliced] == is_latent
    assert [value for value in spliced if value < 1000] == [row for row, yes in enumerate(is_latent) if not yes]
    assert sorted(set(spliced)) == sorted(spliced)


def test_nothing_chosen_changes_nothing() -> None:
    prompt = parse_raw_prompt(f"a {wrap('def f(): return 1')} b", TOKENIZERS, 4)
    assert expanded(prompt, []) is prompt


def test_everything_chosen_leaves_no_latent() -> None:
    text = "one\r\ntwo é\n"
    prompt = expanded(parse_raw_prompt(wrap(text), TOKENIZERS, 4), [(0, len(text))])
    assert prompt.num_latents == 0
    assert prompt.input_ids == TOKENIZERS.decoder(wrap(text))["input_ids"]
    rows = torch.zeros(len(prompt.input_ids), 2)
    assert torch.equal(splice_spans(rows, [torch.ones(prompt.spans[0].num_chunks, 2)], prompt.spans), rows)


def test_a_truncated_span_ends_where_its_tokens_end() -> None:
    prompt = parse_raw_prompt(wrap("abcdefgh"), TOKENIZERS, 2, MemoryLimit(max_tokens=5, truncate=True))
    prompt = expanded(prompt, [(3, 5)])
    assert prompt.spans[0].latent_runs == [(prompt.spans[0].start, prompt.spans[0].start + 2, 0)]
    assert TOKENIZERS.decoder.decode(prompt.input_ids[-3:-1]) == "de"


def test_latents_of_another_chunk_size_are_refused() -> None:
    prompt = expanded(parse_raw_prompt(wrap("abcdefgh"), TOKENIZERS, 2), [(2, 4)])
    with pytest.raises(SpliceError, match="4 chunks but 8 latents"):
        splice_spans(torch.zeros(len(prompt.input_ids), 2), [torch.zeros(8, 2)], prompt.spans)


def test_a_slow_tokenizer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="fast tokenizer"):
        token_offsets(object(), "text", 4)


def test_the_query_is_what_stands_outside_the_memory() -> None:
    raw = parse_raw_prompt(f"What does {wrap('code')} do?", TOKENIZERS, 4)
    assert raw.query.split() == ["What", "does", "do?"]
    turns = [
        ("user", f"{wrap('one')} first"),
        ("assistant", "said"),
        ("user", f"second {wrap('two')}"),
        ("user", wrap("x")),
    ]
    chat = parse_chat_prompt([{"role": role, "content": text} for role, text in turns], TOKENIZERS, 4)
    assert chat.query == "second"
    assert parse_chat_prompt([{"role": "user", "content": wrap("x")}], TOKENIZERS, 4).query == ""


def test_rows_are_the_decoders_tokens_and_chunks_the_encoders() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "ab"])}
    encoder = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    both = PromptTokenizers(decoder=TOKENIZERS.decoder, encoder=PreTrainedTokenizerFast(tokenizer_object=encoder))
    prompt = parse_raw_prompt(wrap("ababab"), both, 1)
    offsets = token_offsets(both.encoder, "ababab", 3)
    prompt = expand(prompt, [[(2, 4)]], [offsets], both)
    (span,) = prompt.spans
    assert (span.num_latents, span.text_rows) == (2, 2)
    assert span.latent_runs == [(span.start, span.start + 1, 0), (span.stop - 1, span.stop, 2)]
