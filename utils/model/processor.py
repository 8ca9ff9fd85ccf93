"""Batches of prompts, with or without targets, as model inputs; parsing stays in `utils.model.prompt`.

    processor = Processor(tokenizers, chunk_size=8)
    prompts = [processor.parse_chat([{"role": "user", "content": "…"}])]
    inputs = processor.collate(prompts, targets=["the answer"])     # loss on the target only

Shape legend: B prompts, T rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from utils.errors import PromptError
from utils.model.prompt import MemoryLimit, MemoryPrompt, PromptTokenizers, parse_chat_prompt, parse_raw_prompt

# Positions with this label are left out of the loss (torch's and transformers' convention).
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """A padded batch.

    Attributes:
        prompts: The prompts, targets appended, whose spans the model encodes.
        attention_mask: [B, T] long, 1 on real rows.
        position_ids: [B, T] long, 0.. on real rows, 0 on padding.
        labels: [B, T] long with `IGNORED_LABEL` outside targets; None without targets.
    """

    prompts: tuple[MemoryPrompt, ...]
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """Tokenizers and limits in one place.

    Attributes:
        tokenizers: Decoder and encoder tokenizer.
        chunk_size: Encoder tokens per latent where a call names none.
        limit: Longest allowed span; no limit by default.
    """

    tokenizers: PromptTokenizers
    chunk_size: int
    limit: MemoryLimit | None = None

    def parse_raw(self, text: str, chunk_size: int | Sequence[int] | None = None) -> MemoryPrompt:
        """Parse one text; see `parse_raw_prompt`."""
        sizes = self.chunk_size if chunk_size is None else chunk_size
        return parse_raw_prompt(text, self.tokenizers, sizes, self.limit)

    def parse_chat(
        self, messages: Sequence[Mapping[str, Any]], chunk_size: int | Sequence[int] | None = None, **template: Any
    ) -> MemoryPrompt:
        """Parse a chat; see `parse_chat_prompt`."""
        sizes = self.chunk_size if chunk_size is None else chunk_size
        return parse_chat_prompt(messages, self.tokenizers, sizes, self.limit, **template)

    def collate(
        self,
        prompts: Sequence[MemoryPrompt],
        targets: Sequence[str] | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> ModelInputs:
        """Pad prompts to one batch.

        Args:
            prompts: Parsed prompts.
            targets: The wanted continuation of each; its tokens and the end token are what the loss is taken on.
            padding_side: Left for generation, right for training.

        Raises:
            PromptError: Another number of targets than prompts, or an empty target.
        """
        rows = [list(prompt.input_ids) for prompt in prompts]
        labels = None
        if targets is not None:
            answers = [self.target_ids(target) for target in targets]
            if len(answers) != len(rows):
                raise PromptError(f"{len(rows)} prompts but {len(answers)} targets: give one target a prompt")
            labels = [[IGNORED_LABEL] * len(row) + answer for row, answer in zip(rows, answers, strict=True)]
            rows = [row + answer for row, answer in zip(rows, answers, strict=True)]
        longest = max(len(row) for row in rows)
        filled = tuple(
            MemoryPrompt(input_ids=row, spans=prompt.spans) for row, prompt in zip(rows, prompts, strict=True)
        )
        return ModelInputs(
            prompts=filled,
            attention_mask=_padded([[1] * len(row) for row in rows], longest, 0, padding_side),
            position_ids=_padded([list(range(len(row))) for row in rows], longest, 0, padding_side),
            labels=None if labels is None else _padded(labels, longest, IGNORED_LABEL, padding_side),
        )

    def target_ids(self, target: str) -> list[int]:
        """Decoder tokens of a target, with the end token.

        Raises:
            PromptError: The target is empty.
        """
        ids = self.tokenizers.decoder(target, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PromptError("a target is empty: there is nothing to learn from it")
        end = self.tokenizers.decoder.eos_token_id
        return [*ids, end] if end is not None else list(ids)


def _padded(rows: Sequence[list[int]], longest: int, filler: int, side: str) -> torch.Tensor:
    padded = []
    for row in rows:
        extra = [filler] * (longest - len(row))
        padded.append(extra + row if side == "left" else row + extra)
    return torch.tensor(padded)
