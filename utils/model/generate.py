"""Prompt rows and their continuation by a Hugging Face decoder: the one place that calls its `generate`.

Shape legend: B prompts, T rows or new tokens, D decoder width, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from utils.model.limits import explain_out_of_memory


@torch.inference_mode()
def continue_rows(
    decoder: Any,
    rows: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    repetition_penalty: float | None = None,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    before_penalties: Sequence[LogitsProcessor] = (),
    **arguments: Any,
) -> list[list[int]]:
    """Continue prompts, as one left-padded batch.

    Args:
        decoder: A Hugging Face causal language model.
        rows: One [T, D] tensor a prompt, of any T.
        max_new_tokens: Most new tokens of each.
        end_ids: Ids that end an answer.
        pad_id: Filler after shorter answers.
        repetition_penalty: Counts the new tokens; None: what the decoder's settings say.
        frequency_penalty: See `CountPenalties`; after the repetition penalty, as in vLLM.
        presence_penalty: Likewise.
        before_penalties: Logits processors that come first.
        arguments: Further ones of Hugging Face's `generate`; greedy without any.

    Returns:
        The new token ids of each prompt, its end token included.

    Raises:
        ConfigError: There is not memory enough.
    """
    embeds_BTD, mask_BT = pad_left(rows)
    penalty = repetition_penalty or decoder.generation_config.repetition_penalty or 1.0
    # transformers' own would skip as many new tokens as a row has padding: embeddings come without padded ids.
    processors = [*before_penalties, *([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else [])]
    if frequency_penalty or presence_penalty:
        processors.append(CountPenalties(frequency_penalty, presence_penalty))
    doing = f"generating for {len(rows)} prompts of up to {embeds_BTD.shape[1]} rows"
    with explain_out_of_memory(doing, "lower --batch-size, or shorten the prompts"):
        ids = decoder.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=pad_id,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList(processors),
            **{"do_sample": False, **arguments},
        )
    return [_through_end(row, end_ids) for row in ids.tolist()]


class CountPenalties(LogitsProcessor):
    """OpenAI's penalties: logit − count · frequency − (count > 0) · presence, of tokens that the answer already has.

    transformers has none of them. Counted are the ids that `generate` has: beside rows, the new ones alone.

    Args:
        frequency: Taken for each time.
        presence: Taken once.

    Source: OpenAI's API reference, "Frequency and presence penalties".
    """

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V] less what ids [B, T] cost."""
        ones_BT = torch.ones_like(input_ids, dtype=scores.dtype)
        counts_BV = torch.zeros_like(scores).scatter_add_(1, input_ids, ones_BT)
        return scores - self._frequency * counts_BV - self._presence * (counts_BV > 0)  # type: ignore[return-value]


def pad_left(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch that ends together, as generation wants it.

    Args:
        rows: One [T, D] tensor a prompt, of any T.

    Returns:
        Rows [B, T, D] with zeros before the shorter prompts, and the mask [B, T], long: 1 where a prompt's row is.
    """
    longest = max(map(len, rows))
    embeds_BTD = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask_BT = torch.zeros(embeds_BTD.shape[:2], dtype=torch.long, device=embeds_BTD.device)
    for number, row in enumerate(rows):
        mask_BT[number, longest - len(row) :] = 1
    return embeds_BTD, mask_BT


def _through_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = (place for place, token in enumerate(ids) if token in end_ids)
    return ids[: next(ends, len(ids)) + 1]
