"""The pieces that hold the right answer, as only an evaluation knows it: what a perfect selector would choose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """1 for the pieces of an answer's first place in a memory, less for its further places; 0 for the other pieces."""
    given = (question.answer,) if isinstance(question.answer, str) else question.answer
    answers = [answer.strip() for answer in given if answer.strip()]
    if not answers:
        raise ConfigError("the policy answer needs the right answer, which an evaluation knows: choose bm25")
    scores = []
    for memory in memories:
        own = np.zeros(len(memory.pieces))
        for answer in answers:
            for rank, match in enumerate(re.finditer(re.escape(answer), memory.text), start=1):
                for piece in memory.pieces_in(*match.span()):
                    own[piece] = max(own[piece], 1 / rank)
        scores.append(own)
    return np.concatenate([np.zeros(0), *scores])
