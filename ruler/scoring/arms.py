"""Runs that are arms of one evaluation, compared on the rows that they share.

    compare_arms(runs)[1]       # {"run": "memory@4", "length": 1024, "score": 41.0, "to_full": {…}, …}

An arm is a run whose settings name one (`python -m ruler run --arms …`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from utils.compress.arms import BM25, FULL, NONE
from utils.intervals import Scores, compare, retention

Run = Mapping[str, Any]


def compare_arms(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A line for each arm and length; none where fewer than two runs are arms.

    Args:
        runs: Scored runs.

    Returns:
        JSON objects: `run`, `length`, `rows`, `score` (0 to 100, mean over the rows of all tasks), `retention`, and the
        paired differences `to_full` and `to_bm25` of `utils.intervals.compare`; None where the other arm is missing.
    """
    arms = {run["settings"]["arm"]: run for run in runs if run["settings"].get("arm")}
    if len(arms) < 2:
        return []
    lengths = sorted({entry["length"] or 0 for run in arms.values() for entry in run["lengths"]})
    lines = []
    for length in lengths:
        scores = {name: _row_scores(run, length) for name, run in arms.items()}
        for name, own in scores.items():
            if not own:
                continue
            bm25 = f"{BM25}@{name.partition('@')[2]}"
            lines.append(
                {
                    "run": arms[name]["name"],
                    "length": length or None,
                    "rows": len(own),
                    "score": round(100 * fmean(own.values()), 2),
                    "retention": retention(own, scores.get(NONE, {}), scores.get(FULL, {})),
                    "to_full": None if name == FULL else compare(own, scores.get(FULL, {})),
                    "to_bm25": None if name == bm25 else compare(own, scores.get(bm25, {})),
                }
            )
    return lines


def _row_scores(run: Run, length: int) -> Scores:
    """Score (0 to 1) of each row of one length, by what the rows are: task, file's fingerprint and row."""
    return {
        (task, scores["rows_sha256"], row): value
        for entry in run["lengths"]
        if (entry["length"] or 0) == length
        for task, scores in entry["tasks"].items()
        for row, value in scores["values"].items()
    }
