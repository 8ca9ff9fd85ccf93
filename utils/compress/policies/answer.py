"""The pieces that hold the right answer, as only an evaluation knows it: what a perfect selector would choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """1 for the pieces of the answer's places, earlier places before later ones; 0 for the others."""
    answer = question.answer.strip()
    if not answer:
        raise ConfigError("the policy answer needs the right answer, which an evaluation knows: choose bm25")
    scores = []
    for memory in memories:
        places = _places(memory.text, answer)
        for begin, end in memory.pieces:
            rank = next((rank for rank, (a, b) in enumerate(places) if a < end and begin < b), None)
            scores.append(0.0 if rank is None else 1 / (1 + rank))
    return np.array(scores)


def _places(text: str, wanted: str) -> list[tuple[int, int]]:
    places, at = [], text.find(wanted)
    while at >= 0:
        places.append((at, at + len(wanted)))
        at = text.find(wanted, at + len(wanted))
    return places
