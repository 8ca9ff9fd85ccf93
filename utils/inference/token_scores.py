"""Log-probabilities of an answer's tokens, and of the likeliest ones in their places.

    scores = TokenScores(tokenizer, num_likeliest=5)      # first among the logits processors; changes nothing
    scores.of(number, token_id, offset)                   # after each step, for the token that was drawn

They are the decoder's own: before penalties, temperature and what narrows the drawing, as vLLM's are.

Shape legend: B answers, V ids.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

# OpenAI's word for what is next to impossible; JSON has no infinity.
_LEAST_LOGPROB = -9999.0
_UNFINISHED = "\ufffd"
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
# A byte as SentencePiece writes it.
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token that may stand in a place.

    Attributes:
        text: Its text; of a part of a character its bytes, as `bytes:\\xc3`.
        bytes: Its text in UTF-8, or its part of it; None where the tokenizer does not tell, and of what is no text.
        logprob: Natural logarithm of its probability.
    """

    text: str
    bytes: tuple[int, ...] | None
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """One token of an answer.

    Attributes:
        token: It.
        likeliest: The likeliest ones in its place, the first one first.
        offset: Whole characters of the answer before it.
    """

    token: TokenLogprob
    likeliest: tuple[TokenLogprob, ...]
    offset: int


class TokenScores(LogitsProcessor):
    """Keeps the log-probabilities of the step that is being drawn.

    Args:
        tokenizer: Of the decoder.
        num_likeliest: Likeliest tokens that are told in each place.
        hidden: Ids that are no text, `utils.checkpoint.pair.framing_tokens`.
    """

    def __init__(self, tokenizer: Any, num_likeliest: int, hidden: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._num_likeliest = num_likeliest
        self._logprobs_BV = torch.empty(0, 0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Note scores [B, V], and give them back as they are."""
        self._logprobs_BV = scores.float().log_softmax(-1)
        return scores

    def of(self, number: int, token_id: int, offset: int) -> ScoredToken:
        """Score the token that an answer got in this step.

        Args:
            number: The answer's row.
            token_id: What was drawn.
            offset: Whole characters of the answer before it.
        """
        logprobs_V = self._logprobs_BV[number]
        values, ids = logprobs_V.topk(min(self._num_likeliest, len(logprobs_V)))
        return ScoredToken(
            token=self._token(token_id, float(logprobs_V[token_id])),
            likeliest=tuple(self._token(*pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)),
            offset=offset,
        )

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        text = str(self._tokenizer.decode([token_id]))
        known: tuple[int, ...] | None = None if token_id in self._hidden else tuple(text.encode())
        if _UNFINISHED in text and (known := _raw_bytes(self._tokenizer.convert_ids_to_tokens(token_id))):
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)
        return TokenLogprob(text=text, bytes=known, logprob=max(logprob, _LEAST_LOGPROB))


def _raw_bytes(piece: str) -> tuple[int, ...] | None:
    """The bytes of a vocabulary's entry that is no whole character."""
    if match := _BYTE.fullmatch(piece):
        return (int(match[1], 16),)
    return tuple(_BYTE_OF[character] for character in piece) if _BYTE_OF.keys() >= {*piece} else None
