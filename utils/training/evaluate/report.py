"""Records → summary rows, a table, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic_path
from utils.training.evaluate.evaluator import FULL, MEMORY, TRUNCATED, perplexity
from utils.training.evaluate.scores import Interval, mean, share

# Task → the metrics that describe it, the first one being drawn.
_REPEATED = ("edit_similarity", "exact")
_ANSWERED = ("exact", "contains")
_METRICS = {"reconstruct": _REPEATED, "copy_symbols": _REPEATED, "continue": ("perplexity",)}


def metrics_of(task: str) -> tuple[str, ...]:
    """What a task is judged by."""
    return _METRICS.get(task, _ANSWERED)


def summarize(records: Iterable[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row for each task, condition and metric: mean, 95 % interval, count, measured compression ratio."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["condition"]), []).append(record)
    rows = []
    for (task, condition), group in groups.items():
        tokens, latents = (sum(r[key] for r in group) for key in ("memory_tokens", "num_latents"))
        for metric in metrics_of(task):
            rows.append(
                {
                    "task": task,
                    "condition": condition,
                    "metric": metric,
                    **dataclasses.asdict(_interval(group, metric, seed)),
                    "memory_tokens": round(tokens / len(group), 1),
                    "ratio": round(tokens / latents, 2) if latents else None,
                }
            )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line for each task and metric, one column a condition."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    cells = {(r["task"], r["metric"], r["condition"]): r for r in rows}
    lines = ["| task | metric | n | " + " | ".join(conditions) + " |", "|---|---|---|" + "---|" * len(conditions)]
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = [cells.get((task, metric, condition)) for condition in conditions]
        count = max(cell["count"] for cell in found if cell)
        values = [f"{cell['mean']:.3f} ({cell['low']:.2f}–{cell['high']:.2f})" if cell else "" for cell in found]
        lines.append(f"| {task} | {metric} | {count} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a task: its first metric over the chunk size, memory beside truncation and full text."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(3.6 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        metric = metrics_of(task)[0]
        chosen = [row for row in rows if row["task"] == task and row["metric"] == metric]
        for kind in (MEMORY, TRUNCATED):
            points = [(int(r["condition"].split("@")[1]), r) for r in chosen if r["condition"].startswith(f"{kind}@")]
            if points:
                sizes = [size for size, _ in points]
                means = [row["mean"] for _, row in points]
                below = [row["mean"] - row["low"] for _, row in points]
                above = [row["high"] - row["mean"] for _, row in points]
                axes.errorbar(sizes, means, yerr=[below, above], marker="o", capsize=3, label=kind)
        for row in chosen:
            if row["condition"].startswith(FULL):
                style = "--" if row["condition"] == FULL else ":"
                axes.axhline(row["mean"], color="gray", linestyle=style, label=row["condition"])
        axes.set(title=task, xlabel="chunk size (tokens per latent)", ylabel=metric.replace("_", " "))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _interval(group: Sequence[dict[str, Any]], metric: str, seed: int) -> Interval:
    if metric == "perplexity":
        # The mean is taken over the logarithm: one odd example must not decide it.
        nll = mean([record["nll"] for record in group], seed)
        values = {name: perplexity(getattr(nll, name)) for name in ("mean", "low", "high")}
        return Interval(**values, count=nll.count)
    if metric == "edit_similarity":
        return mean([record[metric] for record in group], seed)
    return share([record[metric] for record in group])
