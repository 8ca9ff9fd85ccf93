"""Any pieces: the control that shows what a policy is worth. The same memory and query always get the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """A draw for each piece, seeded by query and memory."""
    texts = [question.query, *(memory.text for memory in memories)]
    seed = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(seed, "little"))
    return 1 - draw.random(sum(len(memory.pieces) for memory in memories))
