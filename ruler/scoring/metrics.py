"""How a RULER answer is judged: the reference's substring score, a stricter one, and how sure a mean is.

    value = sample_value(postprocess(" 5437923\x0bfoo"), ["5437923"], metric="all")    # 1.0
    score = official_score([value])                                                    # 100.0, as the reference rounds

Pure functions of strings and numbers; nothing here knows files, lengths or models.

Source: RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from operator import mul
from statistics import fmean
from typing import Literal, NamedTuple

from ruler.registry import Metric
from utils.errors import DatasetError
from utils.intervals import bootstrap, wilson

# RULER's yardstick: what Llama-2-7B scores at 4k. A length counts as usable from here on.
THRESHOLD = 85.6
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """Strip, turn each control character into a newline, strip again: what the reference scores and submits."""
    return _CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def sample_value(prediction: str, references: Sequence[str], metric: Metric, *, strict: bool = False) -> float:
    """Judge one answer.

    Args:
        prediction: The post-processed answer.
        references: Wanted strings; each is looked for on its own, ignoring case.
        metric: `all` is the fraction found, `part` is 1 when any is found; `function` is not for here
            (`similarity.function_value`).
        strict: Count a reference only where no letter, digit or underscore touches it, so that `x48234989` does not
            hold `4823498`.

    Returns:
        A value in 0..1.

    Raises:
        DatasetError: There are no references; a sample without a truth cannot be scored.
    """
    if not references:
        raise DatasetError("a row has no references (`outputs` is empty): prepare the dataset again")
    found = [_contains_word(prediction, r) if strict else r.lower() in prediction.lower() for r in references]
    return float(any(found)) if metric == "part" else sum(found) / len(references)


def _contains_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None


def official_score(values: Sequence[float]) -> float:
    """Mean of sample values × 100, rounded to two decimals as the reference does; 0.0 without samples."""
    return round(sum(values) / len(values) * 100, 2) if values else 0.0


class Interval(NamedTuple):
    """A 95 % interval around a mean, in points of 0..100."""

    low: float
    high: float
    method: Literal["wilson", "bootstrap", "mover"]


def interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of the mean: Wilson's for samples right or wrong, a percentile bootstrap for those between.

    Args:
        values: Sample values in 0..1; None comes back without any.
    """
    if not values:
        return None
    binary = all(value in (0.0, 1.0) for value in values)
    low, high = wilson(sum(values), len(values)) if binary else bootstrap(values)
    return Interval(round(100 * low, 2), round(100 * high, 2), "wilson" if binary else "bootstrap")


def interval_of_task_mean(values_of_tasks: Sequence[Sequence[float]]) -> Interval | None:
    """95 % interval of the plain mean over tasks, put together from the tasks' own intervals.

    Their half-widths add up as squares, each side for itself, so that a perfect score of few rows stays unsure below.

    Args:
        values_of_tasks: Sample values in 0..1, task by task.

    Returns:
        None without tasks.

    Source: MOVER, Zou and Donner, "Construction of confidence limits about effect measures" (Stat. Med. 2008).
    """
    parts = [(100 * fmean(values), sure) for values in values_of_tasks if (sure := interval(values))]
    if not parts:
        return None
    mean = fmean(centre for centre, _ in parts)
    low = mean - math.hypot(*(centre - sure.low for centre, sure in parts)) / len(parts)
    high = mean + math.hypot(*(sure.high - centre for centre, sure in parts)) / len(parts)
    return Interval(round(max(0.0, low), 2), round(min(100.0, high), 2), "mover")


def effective_length(scores: Mapping[int, float]) -> int | None:
    """The largest tested length whose score, rounded to one decimal, reaches the threshold; None if none does."""
    return max((length for length, score in scores.items() if round(score, 1) >= THRESHOLD), default=None)


def length_averages(scores: Mapping[int, float]) -> dict[str, float] | None:
    """Average the scores of several lengths in RULER's three ways; None without lengths.

    Returns:
        `mean`: plain; `weighted_increasing`: with weights 1, 2, 3… from the shortest length on, so that long inputs
        matter most; `weighted_decreasing`: with the same weights from the longest length on.
    """
    if not scores:
        return None
    ordered = [scores[length] for length in sorted(scores)]
    plain, rising = [1] * len(ordered), range(1, len(ordered) + 1)
    weights = {"mean": plain, "weighted_increasing": rising, "weighted_decreasing": rising[::-1]}
    return {name: round(sum(map(mul, of_each, ordered)) / sum(of_each), 2) for name, of_each in weights.items()}
