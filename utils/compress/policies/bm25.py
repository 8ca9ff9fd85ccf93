"""Pieces that share words with the question, by BM25 (bm25s): cheap, exact, and good at names.

Identifiers count whole and in parts, so that "cache size" finds `maxCacheSize` and `max_cache_size`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import bm25s
import numpy as np

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question

_WORD = re.compile(r"[^\W_]+(?:_+[^\W_]+)*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")


def score(memories: Sequence[MemoryText], question: Question) -> np.ndarray:
    """BM25 of each piece."""
    pieces = [words(text) for memory in memories for text in memory.piece_texts]
    wanted = words(question.query)
    if not (wanted and any(pieces)):
        return np.zeros(len(pieces))
    index = bm25s.BM25()
    index.index(pieces, show_progress=False)
    return index.get_scores(wanted)


def words(text: str) -> list[str]:
    """The words of code or prose in lower case: identifiers whole and, of several parts, the parts."""
    found = []
    for word in _WORD.findall(text):
        found.append(word.lower())
        parts = _PART.findall(word)
        if len(parts) > 1:
            found += [part.lower() for part in parts]
    return found
