"""Records → summary rows, a table, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from utils.files import atomic_path
from utils.intervals import bootstrap, wilson
from utils.training.data.tasks.registry import TASKS
from utils.training.evaluate.arms import BM25, FULL, NONE
from utils.training.evaluate.paired import Scores, compare, retention

_PERPLEXITY = "perplexity"


def summarize(records: Iterable[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row for each task, condition and metric.

    Mean, 95 % interval and count; retention, and paired differences to the full text and to BM25 at the same budget
    (None where there is no such arm, and for perplexity); what was too long for the decoder; decoder rows, measured
    compression ratio and times.
    """
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        tasks.setdefault(record["task"], {}).setdefault(record["condition"], []).append(record)
    rows = []
    for task, groups in tasks.items():
        for metric in TASKS[task].metrics:
            scores = {condition: _scores(group, metric) for condition, group in groups.items()}
            for condition, group in groups.items():
                measured = _measured(group)
                if scores[condition]:
                    measured |= _interval(list(scores[condition].values()), metric, seed)
                    measured |= _beside(condition, scores) if metric != _PERPLEXITY else {}
                rows.append({"task": task, "condition": condition, "metric": metric, "count": 0, **measured})
    return rows


def _scores(group: Sequence[dict[str, Any]], metric: str) -> Scores:
    # Perplexity's mean is taken over the logarithm: one odd example must not decide it.
    key = "nll" if metric == _PERPLEXITY else metric
    return {record["number"]: record[key] for record in group if key in record}


def _measured(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an arm costs."""
    tokens, latents, text = (sum(r[key] for r in group) for key in ("memory_tokens", "num_latents", "text_rows"))
    answered = [record for record in group if not record.get("too_long")]
    times = {key: round(fmean(r[key] for r in answered), 1) if answered else None for key in ("encode_ms", "read_ms")}
    return {
        "too_long": len(group) - len(answered),
        "memory_tokens": round(tokens / len(group), 1),
        "decoder_rows": round(fmean(record["prompt_rows"] for record in group), 1),
        "ratio": round(tokens / (latents + text), 2) if latents else None,
        **times,
    }


def _beside(condition: str, scores: dict[str, Scores]) -> dict[str, Any]:
    """An arm beside the others."""
    own, none, full = scores[condition], scores.get(NONE, {}), scores.get(FULL, {})
    bm25 = scores.get(f"{BM25}@{condition.partition('@')[2]}", {})
    return {
        "retention": retention(own, none, full),
        "to_full": None if condition == FULL else compare(own, full),
        "to_bm25": None if condition.startswith(BM25) else compare(own, bm25),
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each task a line an arm. Retention and differences are those of exact answers."""
    return "\n\n".join(_task_table(task, rows) for task in dict.fromkeys(row["task"] for row in rows))


def _task_table(task: str, rows: Sequence[dict[str, Any]]) -> str:
    metrics = TASKS[task].metrics
    asked = _PERPLEXITY not in metrics
    beside = ["retention", "− full (p)", "− bm25 (p)"] if asked else []
    titles = [task, "n", "too long", "rows", *metrics, *beside, "encode ms", "read ms"]
    lines = [_line(titles), "|---" * len(titles) + "|"]
    of_task = [row for row in rows if row["task"] == task]
    for condition in dict.fromkeys(row["condition"] for row in of_task):
        cells = {row["metric"]: row for row in of_task if row["condition"] == condition}
        first, exact = cells[metrics[0]], cells.get("exact", {})
        line = [condition, first["count"], first["too_long"], f"{first['decoder_rows']:.0f}"]
        line += [_score(cells[metric]) for metric in metrics]
        if asked:
            kept = exact.get("retention")
            line += [
                "" if kept is None else f"{kept:.2f}",
                *(_difference(exact.get(k)) for k in ("to_full", "to_bm25")),
            ]
        line += ["" if first[key] is None else f"{first[key]:.0f}" for key in ("encode_ms", "read_ms")]
        lines.append(_line(line))
    if not asked:
        lines += ["", f"{task} asks nothing: the arms that need a question are left out."]
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _score(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.3f} ({cell['low']:.2f}–{cell['high']:.2f})" if cell["count"] else ""


def _difference(compared: dict[str, Any] | None) -> str:
    return f"{compared['difference']:+.3f} ({compared['p']:.3f})" if compared else ""


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a task: its first metric over the decoder's rows, a line an arm over its chunk sizes."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(3.8 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        metric = TASKS[task].metrics[0]
        chosen = [row for row in rows if row["task"] == task and row["metric"] == metric and row["count"]]
        for kind in dict.fromkeys(row["condition"].partition("@")[0] for row in chosen):
            points = sorted(
                (row["decoder_rows"], row["mean"], row["low"], row["high"])
                for row in chosen
                if row["condition"].partition("@")[0] == kind
            )
            places, means, lows, highs = zip(*points, strict=True)
            # A bootstrap bound may lie a rounding error on the wrong side of the mean.
            below = [max(0.0, mean - low) for mean, low in zip(means, lows, strict=True)]
            above = [max(0.0, high - mean) for mean, high in zip(means, highs, strict=True)]
            axes.errorbar(places, means, yerr=[below, above], marker="o", capsize=3, label=kind)
        axes.set(title=task, xlabel="decoder rows", ylabel=metric.replace("_", " "))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _interval(values: Sequence[float], metric: str, seed: int) -> dict[str, Any]:
    """Mean and 95 % interval: Wilson's for shares, else by bootstrap."""
    is_share = type(values[0]) is bool
    low, high = wilson(sum(values), len(values)) if is_share else bootstrap(values, seed)
    interval = {"mean": fmean(values), "low": low, "high": high}
    if metric == _PERPLEXITY:
        interval = {name: math.exp(min(value, 50.0)) for name, value in interval.items()}
    return {**interval, "count": len(values)}
