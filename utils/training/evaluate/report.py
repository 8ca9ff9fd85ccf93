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
from utils.training.evaluate.evaluator import FULL, MEMORY, TRUNCATED


def summarize(records: Iterable[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row for each task, condition and metric: mean, 95 % interval, count, measured compression ratio."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["condition"]), []).append(record)
    rows = []
    for (task, condition), group in groups.items():
        tokens, latents = (sum(r[key] for r in group) for key in ("memory_tokens", "num_latents"))
        for metric in TASKS[task].metrics:
            rows.append(
                {
                    "task": task,
                    "condition": condition,
                    "metric": metric,
                    **_interval(group, metric, seed),
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
        metric = TASKS[task].metrics[0]
        chosen = [row for row in rows if row["task"] == task and row["metric"] == metric]
        for kind in (MEMORY, TRUNCATED):
            points = [(int(r["condition"].split("@")[1]), r) for r in chosen if r["condition"].startswith(f"{kind}@")]
            if points:
                sizes = [size for size, _ in points]
                means = [row["mean"] for _, row in points]
                # A bootstrap bound may lie a rounding error on the wrong side of the mean.
                below = [max(0.0, row["mean"] - row["low"]) for _, row in points]
                above = [max(0.0, row["high"] - row["mean"]) for _, row in points]
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


def _interval(group: Sequence[dict[str, Any]], metric: str, seed: int) -> dict[str, Any]:
    """Mean and 95 % interval: Wilson's for shares, else by bootstrap."""
    # Perplexity's mean is taken over the logarithm: one odd example must not decide it.
    values = [record["nll" if metric == "perplexity" else metric] for record in group]
    is_share = type(values[0]) is bool
    low, high = wilson(sum(values), len(values)) if is_share else bootstrap(values, seed)
    interval = {"mean": fmean(values), "low": low, "high": high}
    if metric == "perplexity":
        interval = {name: math.exp(min(value, 50.0)) for name, value in interval.items()}
    return {**interval, "count": len(values)}
