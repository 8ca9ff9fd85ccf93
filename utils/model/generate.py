"""Prompt rows and their continuation by a Hugging Face decoder: the one place that calls its `generate`.

Shape legend: B prompts, T rows, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

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
        arguments: Further ones of Hugging Face's `generate`; greedy without any.

    Returns:
        The new token ids of each prompt, its end token included.

    Raises:
        ConfigError: There is not memory enough.
    """
    embeds_BTD, mask_BT = pad_left(rows)
    penalty = repetition_penalty or decoder.generation_config.repetition_penalty or 1.0
    # transformers' own would skip as many new tokens as a row has padding: embeddings come without padded ids.
    penalties = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []
    doing = f"generating for {len(rows)} prompts of up to {embeds_BTD.shape[1]} rows"
    with explain_out_of_memory(doing, "lower --batch-size, or shorten the prompts"):
        ids = decoder.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=pad_id,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList(penalties),
            **{"do_sample": False, **arguments},
        )
    return [_through_end(row, end_ids) for row in ids.tolist()]


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
