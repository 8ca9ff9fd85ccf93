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
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

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
        metric: `all` is the fraction found, `part` is 1 when any is found.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A 95 % interval around a mean, in points of 0..100."""

    low: float
    high: float
    method: Literal["wilson", "bootstrap", "mover"]


def interval(values: Sequence[float], *, seed: int = 0) -> Interval | None:
    """95 % interval of the mean: Wilson's for samples right or wrong, a percentile bootstrap for those between.

    Args:
        values: Sample values in 0..1.
        seed: Of the bootstrap's own random stream.

    Returns:
        None without samples.
    """
    if not values:
        return None
    if all(value in (0.0, 1.0) for value in values):
        low, high = wilson(sum(values), len(values))
        return Interval(low=round(100 * low, 2), high=round(100 * high, 2), method="wilson")
    low, high = bootstrap(values, seed)
    return Interval(low=round(100 * low, 2), high=round(100 * high, 2), method="bootstrap")


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
    return Interval(low=round(max(0.0, low), 2), high=round(min(100.0, high), 2), method="mover")


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The largest tested length whose score, rounded to one decimal, reaches the threshold; None if none does."""
    return max((length for length, score in scores.items() if round(score, 1) >= threshold), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthAverages:
    """RULER's three summaries over lengths.

    Attributes:
        mean: Plain mean.
        weighted_increasing: Weights 1, 2, 3… from the shortest length on: long inputs matter most.
        weighted_decreasing: The same weights from the longest length on.
    """

    mean: float
    weighted_increasing: float
    weighted_decreasing: float


def length_averages(scores: Mapping[int, float]) -> LengthAverages | None:
    """Average the scores of several lengths in RULER's three ways; None without lengths."""
    if not scores:
        return None
    ordered = [scores[length] for length in sorted(scores)]
    weights = range(1, len(ordered) + 1)
    total = sum(weights)
    return LengthAverages(
        mean=round(sum(ordered) / len(ordered), 2),
        weighted_increasing=round(sum(w * s for w, s in zip(weights, ordered, strict=True)) / total, 2),
        weighted_decreasing=round(sum(w * s for w, s in zip(reversed(weights), ordered, strict=True)) / total, 2),
    )
