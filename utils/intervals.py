"""95 % intervals around a mean: how sure a measured share or score is.

    low, high = wilson(8, 10)                  # 0.490, 0.943
    low, high = bootstrap([0.2, 0.7, 0.9])

Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (JASA 1927); percentile
bootstrap, B. Efron (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from statistics import fmean

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
