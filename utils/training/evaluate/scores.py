"""Scores of one answer."""

from __future__ import annotations

import re

import numpy as np


def is_exact(answer: str, wanted: str) -> bool:
    """Whether an answer is what was wanted, apart from white space around it."""
    return answer.strip() == wanted.strip()


def contains(answer: str, wanted: str) -> bool:
    """Whether the wanted text stands in the answer, and not inside a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(wanted.strip())}(?!\w)", answer) is not None


def edit_similarity(answer: str, wanted: str) -> float:
    """1 − Levenshtein distance / longer length, over characters: 1 for equal texts, 0 for nothing in common."""
    if not answer or not wanted:
        return float(answer == wanted)
    a, b = (np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) for text in (answer, wanted))
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for number, character in enumerate(a, start=1):
        # Replace or delete first; an insertion then carries the best value to the right, one more each place.
        best = np.minimum(row[1:] + 1, row[:-1] + (b != character))
        row = np.minimum.accumulate(np.concatenate([[number], best]) - steps) + steps
    return 1.0 - int(row[-1]) / max(len(a), len(b))
