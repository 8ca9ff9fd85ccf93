"""Pieces whose latents are like the question's: no word has to agree, and the memory is read by nobody again.

The question goes through the encoder as a memory of its own. A chunk is as similar as the likest of the question's
latents (cosine, after the memory's mean is taken off both: it is what all latents share); a piece is as similar as its
likest chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """Similarities, moved so that all are above 0."""
    if question.encode is None:
        raise ConfigError("the policy latents needs the encoder: choose bm25 where there is none")
    asked, *encoded = question.encode(memories)
    mean = np.concatenate(encoded).mean(axis=0)
    asked = _unit(asked - mean)
    scores: list[float] = []
    for memory, latents in zip(memories, encoded, strict=True):
        of_chunk = (_unit(latents - mean) @ asked.T).max(axis=1)
        for first, stop in memory.piece_tokens:
            chunks = of_chunk[first // memory.chunk_size : -(-stop // memory.chunk_size)]
            scores.append(float(chunks.max(initial=-1)))
    return np.array(scores) + 2


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
