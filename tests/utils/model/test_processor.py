"""Batches: padding on either side, and labels on the targets alone."""

from __future__ import annotations

import pytest

from tests.support.tiny import tokenizers
from utils.errors import PromptError
from utils.model.markers import MEMORY_END, MEMORY_START, wrap
from utils.model.processor import IGNORED_LABEL, Processor

PROCESSOR = Processor(tokenizers=tokenizers(), chunk_size=4)
TEXTS = [f"ab{MEMORY_START}0123456789{MEMORY_END}", "no memory at all", wrap("x")]
TARGETS = ["yes", "a longer answer", "n"]


def decode(ids: list[int]) -> str:
    return PROCESSOR.tokenizers.decoder.decode(ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_to_the_longest(side: str) -> None:
    prompts = [PROCESSOR.parse_raw(text) for text in TEXTS]
    inputs = PROCESSOR.collate(prompts, padding_side=side)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert inputs.attention_mask.shape == inputs.position_ids.shape == (3, max(lengths))
    assert inputs.labels is None
    for mask, positions, length in zip(inputs.attention_mask, inputs.position_ids, lengths, strict=True):
        assert mask.sum() == length
        assert bool(mask[0 if side == "right" else -1])
        assert positions[mask.bool()].tolist() == list(range(length))
        assert not positions[~mask.bool()].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_target_and_its_end(side: str) -> None:
    prompts = [PROCESSOR.parse_raw(text) for text in TEXTS]
    inputs = PROCESSOR.collate(prompts, TARGETS, padding_side=side)
    assert inputs.labels is not None
    for row, target, labels, prompt in zip(inputs.prompts, TARGETS, inputs.labels, prompts, strict=True):
        assert row.spans == prompt.spans
        assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        learnt = labels[labels != IGNORED_LABEL].tolist()
        assert decode(learnt) == target + "<|im_end|>"
        assert row.input_ids[-len(learnt) :] == learnt
        real = labels[: len(row.input_ids)] if side == "right" else labels[-len(row.input_ids) :]
        assert real.tolist() == [IGNORED_LABEL] * len(prompt.input_ids) + learnt
    assert prompts[0].input_ids == PROCESSOR.parse_raw(TEXTS[0]).input_ids


def test_targets_must_fit() -> None:
    prompts = [PROCESSOR.parse_raw(text) for text in TEXTS]
    with pytest.raises(PromptError, match="3 prompts but 2 targets"):
        PROCESSOR.collate(prompts, TARGETS[:2])
    with pytest.raises(PromptError, match="a target is empty"):
        PROCESSOR.collate(prompts, ["a", "", "b"])


def test_a_chunk_size_of_zero_is_not_the_default() -> None:
    assert PROCESSOR.parse_raw(TEXTS[0]).spans[0].chunk_size == 4
    assert PROCESSOR.parse_raw(TEXTS[0], 2).spans[0].chunk_size == 2
    with pytest.raises(PromptError, match="chunk size must be at least 1, got 0"):
        PROCESSOR.parse_raw(TEXTS[0], 0)
    with pytest.raises(PromptError, match="chunk size must be at least 1, got 0"):
        PROCESSOR.parse_chat([{"role": "user", "content": TEXTS[0]}], 0)
