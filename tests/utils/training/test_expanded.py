"""Training rows with text beside latents: the prompts that expansion gives, drawn as often as asked, never a label."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.reference import next_token_losses
from utils.errors import ConfigError, DatasetError
from utils.files import read_jsonl, write_jsonl
from utils.model.expand import expand, token_offsets
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.model.prompt import PromptTokenizers
from utils.model.splice import splice_spans
from utils.training.config import StageConfig
from utils.training.data.cache import TokenCache, TokenizedExample, tokenize_row
from utils.training.expanded import draw_shown
from utils.training.losses import TrainedPair
from utils.training.packing import ExampleStream, RowPacker
from utils.training.rows import Draw, PackedRow, pack
from utils.training.toy import build_toy_pair, toy_tokenizer

SIZES = {1: 1.0, 4: 1.0, 7: 1.0}
ROWS = "rows"


def coarse_tokenizer() -> PreTrainedTokenizerFast:
    """Three characters a token, across line ends: an encoder's tokens that are not the decoder's."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,3}"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def coarse_processor() -> Processor:
    tokenizers = PromptTokenizers(decoder=toy_tokenizer(), encoder=coarse_tokenizer())
    return Processor(tokenizers=tokenizers, chunk_size=4)


def toy_processor() -> Processor:
    return Processor(tokenizers=build_toy_pair()[1], chunk_size=4)


def memory_of(number: int, num_lines: int = 24) -> str:
    return "\n".join(f"name_{number}_{line} = {number * 100 + line}" for line in range(num_lines))


def row_of(number: int) -> dict[str, Any]:
    question = f"What is name_{number}_7?"
    messages = [{"role": "user", "content": f"{wrap(memory_of(number))}\n{question}"}]
    return {"messages": messages, "target": str(number * 100 + 7)}


def text_row_of(number: int) -> dict[str, Any]:
    return {"text": f"see {wrap(memory_of(number, 9))} and {wrap(memory_of(number + 50, 5))} there"}


ALL_ROWS = [*(row_of(number) for number in range(1, 21)), *(text_row_of(number) for number in range(1, 6))]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenCache]:
    root = tmp_path_factory.mktemp("mixed")
    write_jsonl(root / "rows.jsonl", ALL_ROWS)
    return {
        ROWS: TokenCache.build(root / "rows", root / "rows.jsonl", read_jsonl(root / "rows.jsonl"), toy_processor())
    }


def packer_of(caches: dict[str, TokenCache], expanded: float, memory_tokens: int | None = None) -> RowPacker:
    stream = ExampleStream(caches, dict.fromkeys(caches, 1.0), SIZES, seed="7", expanded=expanded)
    return RowPacker(stream, 1500, toy_processor().tokenizers.markers, memory_tokens)


def digest(rows: list[PackedRow]) -> str:
    """Of everything in rows without text beside latents."""
    numbers: list[Any] = []
    for row in rows:
        for values in (row.input_ids, row.position_ids, row.label_rows, row.labels, row.label_weights):
            numbers.append(values.tolist())
        numbers.append(row.lengths)
        numbers.append([(s.start, s.stop, s.chunk_size, s.token_ids.tolist()) for s in row.spans])  # type: ignore[union-attr]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


@pytest.mark.parametrize("processor", [coarse_processor(), toy_processor()], ids=["two tokenizers", "one tokenizer"])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16, 64])
def test_a_mixed_row_is_the_prompt_that_expansion_gives(processor: Processor, chunk_size: int) -> None:
    tokenizers = processor.tokenizers
    seen: Counter[int] = Counter()
    for number, row in enumerate(ALL_ROWS):
        example = tokenize_row(row, processor, "here")
        shown = draw_shown(Random(number), example, chunk_size)
        packed = pack([(Draw(ROWS, number, chunk_size, shown), example)], tokenizers.markers)
        if "text" in row:
            prompt, target = processor.parse_raw(row["text"], chunk_size), []
        else:
            prompt = processor.parse_chat(row["messages"], chunk_size)
            target = processor.target_ids(row["target"])
        chosen: list[list[tuple[int, int]]] = [[] for _ in prompt.spans]
        for candidate in (example.candidates[c] for c in shown):
            text = tokenizers.decoder.decode(candidate.ids)
            begin = prompt.spans[candidate.span].text.index(text)
            chosen[candidate.span].append((begin, begin + len(text)))
        offsets = [token_offsets(tokenizers.encoder, span.text, len(span.token_ids)) for span in prompt.spans]
        expected = expand(prompt, chosen, offsets, tokenizers)
        assert packed.input_ids.tolist() == [*expected.input_ids, *target]
        for mine, theirs in zip(packed.spans, expected.spans, strict=True):
            assert (mine.start, mine.stop, mine.latent_runs) == (theirs.start, theirs.stop, theirs.latent_runs)
            assert [s.rows for s in mine.segments] == [s.rows for s in theirs.segments]
            seen[len(mine.segments)] += 1
        latents = [torch.randn(span.num_chunks, 5) for span in packed.spans]
        embeds = torch.randn(len(expected.input_ids), 5)
        spliced = splice_spans(embeds, latents, packed.spans)
        assert torch.equal(spliced, splice_spans(embeds, latents, expected.spans))
    assert {1, 2} <= set(seen)


def test_the_loss_of_a_mixed_row_is_the_model_s_own() -> None:
    model, tokenizers = build_toy_pair()
    torch.nn.init.normal_(model.memory_encoder.adapter.fc1.bias)
    processor, row = Processor(tokenizers=tokenizers, chunk_size=4), row_of(3)
    example = tokenize_row(row, processor, "here")
    shown = next(c for c, candidate in enumerate(example.candidates) if candidate.holds_answer)
    packed = pack([(Draw(ROWS, 0, 4), example), (Draw(ROWS, 0, 4, (shown,)), example)], tokenizers.markers)
    prompt = processor.parse_chat(row["messages"], 4)
    begin = prompt.spans[0].text.index("name_3_7")
    chosen = [(begin, prompt.spans[0].text.index("\n", begin) + 1)]
    offsets = token_offsets(tokenizers.encoder, prompt.spans[0].text, len(prompt.spans[0].token_ids))
    mixed = expand(prompt, [chosen], [offsets], tokenizers)
    expected = sum(next_token_losses(model, processor, p, row["target"]).sum() for p in (prompt, mixed))
    torch.testing.assert_close(TrainedPair(model, tokenizers.markers)(packed), expected, rtol=1e-5, atol=1e-5)


def test_text_of_memory_is_never_a_label(caches: dict[str, TokenCache]) -> None:
    packer = packer_of(caches, expanded=1.0)
    text_rows = 0
    for row in (packer.next_row() for _ in range(10)):
        inside = {at for span in row.spans for at in range(span.start - 1, span.stop + 1)}
        assert not inside & {at + 1 for at in row.label_rows.tolist()}
        assert row.input_ids[row.label_rows + 1].tolist() == row.labels.tolist()
        text_rows += sum(span.text_rows for span in row.spans)
    assert text_rows > 0


def test_a_share_is_shown_as_text_and_half_of_it_with_the_answer(caches: dict[str, TokenCache]) -> None:
    stream = ExampleStream(caches, {ROWS: 1.0}, SIZES, seed="3", expanded=0.4)
    draws = [stream.next() for _ in range(4000)]
    mixed = [draw for draw in draws if draw.shown]
    assert len(mixed) / len(draws) == pytest.approx(0.4, abs=0.03)
    candidates = [caches[ROWS][draw.number].candidates for draw in mixed]
    by_selector = [draw for draw, own in zip(mixed, candidates, strict=True) if own[draw.shown[0]].selected]
    could_be = sum(any(c.selected for c in own) for own in candidates)
    assert len(by_selector) / could_be == pytest.approx(0.5, abs=0.05)
    others = [draw for draw in mixed if draw not in by_selector]
    assert {len(draw.shown) for draw in others} == {1, 2, 3}
    asked = [(draw, caches[ROWS][draw.number]) for draw in others]
    holds = [
        any(example.candidates[c].holds_answer for c in draw.shown)
        for draw, example in asked
        if any(candidate.holds_answer for candidate in example.candidates)
    ]
    assert sum(holds) / len(holds) == pytest.approx(0.5, abs=0.07)


def test_without_a_share_rows_are_what_they_always_were(caches: dict[str, TokenCache]) -> None:
    packer = packer_of(caches, expanded=0.0, memory_tokens=1000)
    assert digest([packer.next_row() for _ in range(12)]) == GOLDEN


def test_a_share_changes_neither_examples_nor_chunk_sizes(caches: dict[str, TokenCache]) -> None:
    plain, mixed = (ExampleStream(caches, {ROWS: 1.0}, SIZES, seed="3", expanded=share) for share in (0.0, 0.7))
    for _ in range(100):
        before, after = plain.next(), mixed.next()
        assert (before.number, before.chunk_size) == (after.number, after.chunk_size)


def test_a_resumed_stream_shows_the_same_text(caches: dict[str, TokenCache]) -> None:
    packer = packer_of(caches, expanded=0.6)
    for steps in range(6):
        packer.next_row()
        resumed = packer_of(caches, expanded=0.6)
        resumed.restore(json.loads(json.dumps(packer.state())))
        if steps == 5:
            for _ in range(6):
                mine, theirs = resumed.next_row(), packer.next_row()
                assert torch.equal(mine.input_ids, theirs.input_ids)
                assert [s.segments for s in mine.spans] == [s.segments for s in theirs.spans]
    state = packer.state()
    state["waiting"] = [ROWS, 0, 4, [99], []]
    with pytest.raises(DatasetError, match="other data"):
        packer.restore(state)


def test_a_cache_keeps_its_candidates(caches: dict[str, TokenCache]) -> None:
    for number, row in enumerate(ALL_ROWS):
        stored, made = caches[ROWS][number], tokenize_row(row, toy_processor(), "here")
        assert len(stored.candidates) > 0
        for a, b in zip(stored.candidates, made.candidates, strict=True):
            assert (a.span, a.tokens, a.holds_answer, a.selected) == (b.span, b.tokens, b.holds_answer, b.selected)
            assert a.ids.tolist() == b.ids.tolist()


def texts_of(example: TokenizedExample, processor: Processor) -> tuple[list[str], list[str]]:
    """What candidates say: those with the answer, and the others."""
    decode = processor.tokenizers.decoder.decode
    found = [(c.holds_answer, decode(c.ids)) for c in example.candidates if not c.selected]
    return [text for holds, text in found if holds], [text for holds, text in found if not holds]


def test_the_answer_is_found_as_a_word_and_shown_with_its_line() -> None:
    row = row_of(1)
    row["messages"][0]["content"] = wrap("zip = 1071\nzap = 8\n" + memory_of(1)) + "\nWhat?"
    processor = toy_processor()
    with_answer, others = texts_of(tokenize_row(row, processor, "here"), processor)
    assert with_answer == ["name_1_7 = 107\n"]
    assert others
    assert not any("= 107\n" in text for text in others)
    assert all(text.endswith(("\n", "123")) for text in others)


def test_the_first_answers_of_a_chat_have_segments() -> None:
    turns = [("user", f"{wrap(memory_of(2))}\nname_2_3?"), ("assistant", "203")]
    for line in (9, 15, 20):
        turns += [("user", f"name_2_{line}?"), ("assistant", str(200 + line))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    processor = toy_processor()
    with_answer, _ = texts_of(tokenize_row(row, processor, "here"), processor)
    assert with_answer == [f"name_2_{line} = {200 + line}\n" for line in (3, 9, 15)]


def test_an_answer_that_is_the_memory_has_no_segment_of_its_own() -> None:
    row = row_of(1) | {"target": memory_of(1)}
    processor = toy_processor()
    with_answer, others = texts_of(tokenize_row(row, processor, "here"), processor)
    assert not with_answer
    assert others


def test_a_line_with_a_control_token_is_never_text() -> None:
    processor = toy_processor()
    memory = "\n".join(["x = 1", *["stop <|end|>"] * 20])
    row = {"messages": [{"role": "user", "content": wrap(memory)}], "target": "x"}
    with_answer, others = texts_of(tokenize_row(row, processor, "here"), processor)
    assert not any("<|end|>" in text for text in with_answer + others)


def test_a_memory_of_one_line_stays_latents() -> None:
    processor = toy_processor()
    row = {"messages": [{"role": "user", "content": wrap("a = 1") + "\na?"}], "target": "1"}
    assert tokenize_row(row, processor, "here").candidates == ()


@pytest.mark.parametrize("values", [{"expanded": 1.5}, {"expanded": -0.1}, {"preset": "align", "expanded": 0.5}])
def test_a_share_that_cannot_be_is_an_error(values: dict[str, Any]) -> None:
    settings = {"preset": "decoder", "steps": 1, "learning_rates": {"adapter": 1e-3}, "chunk_sizes": {1: 1.0}, **values}
    with pytest.raises(ConfigError, match=r"expanded|align"):
        StageConfig(**settings)


# Of these rows as they were packed before text could stand beside latents.
GOLDEN = "0d406b6db415e9f3bc016d2fd0d2d3d29ea5e97f666892fe3ab8e44f37bd5669"


def test_the_selector_is_asked_what_the_example_asks() -> None:
    processor = toy_processor()
    example = tokenize_row(row_of(3), processor, "here")
    selected = [processor.tokenizers.decoder.decode(c.ids) for c in example.candidates if c.selected]
    assert any("name_3_7" in text for text in selected)
    shown = {draw_shown(Random(seed), example, 4) for seed in range(20)}
    assert tuple(c for c, candidate in enumerate(example.candidates) if candidate.selected) in shown
