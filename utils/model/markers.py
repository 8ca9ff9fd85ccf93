"""The three marker strings and how a tokenizer maps them to ids; their only home.

The prompt     "Explain <|memory_start|>def f(): …<|memory_end|>"
becomes        "Explain <|memory_start|><|memory|><|memory|><|memory_end|>"   one placeholder a latent
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.errors import CheckpointError

MEMORY_START = "<|memory_start|>"
MEMORY_END = "<|memory_end|>"
MEMORY = "<|memory|>"
MARKERS = (MEMORY_START, MEMORY_END, MEMORY)
# What a memory becomes before it is widened to one placeholder a latent.
PLACEHOLDER = MEMORY_START + MEMORY + MEMORY_END


def wrap(memory: str) -> str:
    """A text as a prompt's memory: between the markers."""
    return f"{MEMORY_START}{memory}{MEMORY_END}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkerIds:
    """Decoder token ids of the three markers."""

    start: int
    end: int
    memory: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> MarkerIds:
        """Look the markers up in a Hugging Face tokenizer.

        Raises:
            CheckpointError: A marker is not one token of this tokenizer.
        """
        ids = [_marker_id(tokenizer, marker) for marker in (MEMORY_START, MEMORY_END, MEMORY)]
        return cls(start=ids[0], end=ids[1], memory=ids[2])


def _marker_id(tokenizer: Any, marker: str) -> int:
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
        where = getattr(tokenizer, "name_or_path", "") or "the decoder tokenizer"
        raise CheckpointError(
            f"{where}: marker token {marker} is missing (expected one id, got {ids}): add the three markers "
            f"{', '.join(MARKERS)} as special tokens, or use the tokenizer that came with the checkpoint"
        )
    return int(ids[0])
