"""Nothing stays text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """Zeros."""
    return np.zeros(sum(len(memory.pieces) for memory in memories))
