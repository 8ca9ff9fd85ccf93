"""Answers while they are drawn: each token is seen as it comes, text is passed on, and finished answers end.

watch = AnswerWatch(pieces, end_ids, on_piece=print)
decoder.generate(…, streamer=watch, stopping_criteria=[watch.has_ended])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from utils.inference.text_pieces import TextPieces
from utils.inference.token_scores import ScoredToken, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPiece:
    """What became certain of an answer.

    Attributes:
        number: Which answer of the batch.
        text: Its next characters.
        tokens: Those whose first character is among them, where scores were asked for; after a stop string none.
    """

    number: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()


class AnswerWatch(BaseStreamer):
    """Sees each token as it is drawn.

    Args:
        pieces: The text of each answer.
        end_ids: Ids that end an answer; they are no part of it.
        on_piece: Told what becomes certain.
        cancelled: Ends the work at the next token.
        scores: Of the tokens; None where nobody asks.
    """

    def __init__(
        self,
        pieces: Sequence[TextPieces],
        end_ids: Sequence[int],
        on_piece: Callable[[AnswerPiece], None] | None = None,
        cancelled: threading.Event | None = None,
        scores: TokenScores | None = None,
    ) -> None:
        self._pieces = pieces
        self._open = list(range(len(pieces)))
        self._end_ids = end_ids
        self._on_piece = on_piece or (lambda piece: None)
        self._cancelled = cancelled or threading.Event()
        self._scores = scores
        self._waiting: list[list[ScoredToken]] = [[] for _ in pieces]

    def put(self, value: torch.Tensor) -> None:
        """Take the next id of each answer; the first call brings the prompts', of which there are none beside rows."""
        if value.ndim > 1:
            return
        tokens = value.tolist()
        for number in [*self._open]:
            pieces = self._pieces[number]
            is_end = tokens[number] in self._end_ids
            if self._scores and not is_end:
                self._waiting[number].append(self._scores.of(number, tokens[number], pieces.num_characters))
            self._tell(number, pieces.add(tokens[number], is_end=is_end))
            if is_end or pieces.stopped:
                self._open.remove(number)

    def end(self) -> None:
        """Pass on what was held back."""
        for number, pieces in enumerate(self._pieces):
            text = pieces.finish()
            self._tell(number, text, is_last=not pieces.stopped)

    def has_ended(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """The stopping criterion [B] for stop strings and for a client that has gone."""
        stopped = [pieces.stopped or self._cancelled.is_set() for pieces in self._pieces]
        return torch.tensor(stopped, dtype=torch.bool, device=ids.device)

    def _tell(self, number: int, text: str, *, is_last: bool = False) -> None:
        # Of what was held back a stop string may still cut off the end, and tokens with it.
        certain = len(self._pieces[number].text)
        waiting = self._waiting[number]
        tokens = tuple(token for token in waiting if is_last or token.offset < certain)
        self._waiting[number] = waiting[len(tokens) :]
        if text or tokens:
            self._on_piece(AnswerPiece(number=number, text=text, tokens=tokens))
