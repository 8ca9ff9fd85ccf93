"""How sure a measured mean is, and a difference between two: 95 % intervals and paired comparisons.

    low, high = wilson(8, 10)                  # 0.490, 0.943
    low, high = bootstrap([0.2, 0.7, 0.9])
    compare({1: True, 2: True, 3: False}, {1: False, 2: True, 3: False})      # difference 0.33, p 1.0
    retention(arm, none, full)                                               # (arm − none) / (full − none)

Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (JASA 1927); percentile
bootstrap, B. Efron (1979); Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages" (Psychometrika 1947), in its exact form; A. Agresti and Y. Min, "Simple improved confidence intervals for
comparing matched proportions" (Statistics in Medicine 2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean
from typing import Any

# What tells an example from the others → its score.
Scores = Mapping[Any, float]

_Z = 1.959963984540054
_RESAMPLES = 2000


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's interval of a proportion, as fractions; it stays sensible at 0 and at 1.

    Args:
        successes: At most `trials`.
        trials: At least 1.
    """
    rate, z2 = successes / trials, _Z**2
    centre = rate + z2 / (2 * trials)
    spread = _Z * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentiles of the means of resampled values, which may be on any scale.

    Args:
        values: At least one.
        seed: Of a random stream of its own.
    """
    random = Random(seed)
    means = sorted(fmean(random.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]


def compare(arm: Scores, other: Scores, seed: int = 0) -> dict[str, Any] | None:
    """Two arms on the same examples.

    Args:
        arm: What is judged.
        other: What it is compared with.
        seed: Of the bootstrap, where scores are no shares.

    Returns:
        On the examples that both have, the mean `difference`, its 95 % interval `low` to `high`, their `count`, and for
        shares McNemar's exact `p`. None without such examples.
    """
    common = sorted(arm.keys() & other.keys())
    if not common:
        return None
    differences = [arm[n] - other[n] for n in common]
    result: dict[str, Any] = {"difference": fmean(differences), "count": len(common)}
    if all(type(scores[n]) is bool for scores in (arm, other) for n in common):
        better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        low, high = paired_interval(better, worse, len(common))
        return {**result, "low": low, "high": high, "p": mcnemar(better, worse)}
    low, high = bootstrap(differences, seed)
    return {**result, "low": low, "high": high}


def paired_interval(better: int, worse: int, trials: int) -> tuple[float, float]:
    """Agresti and Min's interval of a difference between two shares of the same examples.

    Half a case is added to each of the four cells (both, neither, one, the other), so that it stays sensible where no
    example tells the arms apart.

    Args:
        better: Examples that only the first arm gets right.
        worse: Examples that only the second arm gets right.
        trials: All examples.
    """
    total = trials + 2
    centre = (better - worse) / total
    spread = _Z * math.sqrt(max(0.0, better + worse + 1 - (better - worse) ** 2 / total)) / total
    return max(-1.0, centre - spread), min(1.0, centre + spread)


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
