"""Everything stays text: the prompt without compression, by the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """The same for all pieces."""
    return np.ones(sum(len(memory.pieces) for memory in memories))
