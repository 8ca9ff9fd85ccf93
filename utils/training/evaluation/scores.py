"""Scores of one answer, and intervals around means of many."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

_Z = 1.959964  # of a 95 % interval
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval over `count` examples."""

    mean: float
    low: float
    high: float
    count: int


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


def wilson(successes: int, count: int) -> Interval:
    """Share of successes with Wilson's 95 % interval.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    share = successes / count
    scale = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / scale
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    return Interval(mean=share, low=max(0.0, middle - half), high=min(1.0, middle + half), count=count)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of values with a bootstrap 95 % interval (percentiles of resampled means)."""
    random = Random(seed)
    means = sorted(sum(random.choices(values, k=len(values))) / len(values) for _ in range(_RESAMPLES))
    low, high = means[round(0.025 * _RESAMPLES)], means[round(0.975 * _RESAMPLES) - 1]
    return Interval(mean=sum(values) / len(values), low=low, high=high, count=len(values))
