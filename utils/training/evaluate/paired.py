"""Two arms on the same examples: their difference, whether it may be chance, and what is kept of what the text gives.

    compare({1: True, 2: True, 3: False}, {1: False, 2: True, 3: False})      # difference 0.33, p 1.0
    retention(arm, none, full)                                               # (arm − none) / (full − none)

Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages"
(Psychometrika 1947), in its exact form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

# Number of an example → its score.
Scores = Mapping[int, float]


def compare(arm: Scores, other: Scores) -> dict[str, Any] | None:
    """The mean difference on the examples that both have, their count, and for shares McNemar's exact p.

    None without such examples.
    """
    common = sorted(arm.keys() & other.keys())
    if not common:
        return None
    result: dict[str, Any] = {"difference": fmean(arm[n] - other[n] for n in common), "count": len(common)}
    if all(type(scores[n]) is bool for scores in (arm, other) for n in common):
        result["p"] = mcnemar(sum(arm[n] > other[n] for n in common), sum(arm[n] < other[n] for n in common))
    return result


def mcnemar(better: int, worse: int) -> float:
    """How likely so uneven a split is (two-sided) if either of two arms is as often the better one."""
    number = better + worse
    tail = sum(math.comb(number, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**number)


def retention(arm: Scores, none: Scores, full: Scores) -> float | None:
    """What an arm keeps of what the full text gives beyond the question alone; None where it gives nothing."""
    common = arm.keys() & none.keys() & full.keys()
    if not common:
        return None
    mean, least, most = (fmean(scores[n] for n in common) for scores in (arm, none, full))
    return (mean - least) / (most - least) if most > least else None
