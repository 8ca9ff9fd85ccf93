"""Records → summary rows, tables, a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from utils.compress.arms import BM25, FULL, KINDS, MEMORY, NONE
from utils.files import atomic_path
from utils.intervals import Scores, bootstrap, compare, retention, wilson
from utils.training.data.tasks.registry import TASKS

_PERPLEXITY = "perplexity"
# Which arms a reader wants to see beaten by, or beating, text of as many rows.
_JUDGED = (MEMORY, "expand")


def summarize(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, length of memory, condition and metric.

    Mean, 95 % interval and count, and the mean of each seed; retention, and paired differences to the full text and to
    BM25 at the same budget (None where there is no such arm, and for perplexity); what was too long for the decoder;
    decoder rows, measured compression ratio and times.
    """
    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        place = record["task"], record.get("length", "")
        cells.setdefault(place, {}).setdefault(record["condition"], []).append(record)
    rows = []
    for (task, length), groups in cells.items():
        for metric in TASKS[task].metrics:
            scores = {condition: _scores(group, metric) for condition, group in groups.items()}
            for condition in sorted(groups, key=_order):
                group = groups[condition]
                measured = _measured(group)
                if scores[condition]:
                    measured |= _interval(list(scores[condition].values()), metric)
                    measured["by_seed"] = _by_seed(group, metric)
                    measured |= _beside(condition, scores) if metric != _PERPLEXITY else {}
                cell = {"task": task, "length": length, "condition": condition, "metric": metric}
                rows.append({**cell, "count": 0, **measured})
    return rows


def _order(condition: str) -> tuple[int, int, str]:
    """The arms without a budget first, then by chunk size; a condition that is no arm behind them."""
    kind, _, size = condition.partition("@")
    return int(size or 0), KINDS.index(kind) if kind in KINDS else len(KINDS), condition


def _key(metric: str) -> str:
    # Perplexity's mean is taken over the logarithm: one odd example must not decide it.
    return "nll" if metric == _PERPLEXITY else metric


def _scores(group: Sequence[dict[str, Any]], metric: str) -> Scores:
    return {record["number"]: record[_key(metric)] for record in group if _key(metric) in record}


def _by_seed(group: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    seeds: dict[str, list[float]] = {}
    for record in group:
        if _key(metric) in record:
            seeds.setdefault(str(record.get("seed", "")), []).append(record[_key(metric)])
    means = {seed: fmean(values) for seed, values in seeds.items()}
    return {seed: _exp(mean) if metric == _PERPLEXITY else mean for seed, mean in means.items()}


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
    """Markdown: for each task and length a line an arm. Retention and differences are those of exact answers."""
    places = dict.fromkeys((row["task"], row["length"]) for row in rows)
    return "\n\n".join(_task_table([row for row in rows if (row["task"], row["length"]) == at]) for at in places)


def _task_table(rows: Sequence[dict[str, Any]]) -> str:
    task, length = rows[0]["task"], rows[0]["length"]
    metrics = TASKS[task].metrics
    asked = _PERPLEXITY not in metrics
    seeds = max(len(row.get("by_seed", ())) for row in rows)
    beside = ["retention", "− full (p)", "− bm25 (p)"] if asked else []
    spread = [f"{seeds} seeds"] if seeds > 1 else []
    titles = [f"{task} {length}".strip(), "n", "too long", "rows", *metrics, *spread, *beside, "encode ms", "read ms"]
    lines = [_line(titles), "|---" * len(titles) + "|"]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        cells = {row["metric"]: row for row in rows if row["condition"] == condition}
        first, exact = cells[metrics[0]], cells.get("exact", {})
        line = [condition, first["count"], first["too_long"], f"{first['decoder_rows']:.0f}"]
        line += [_score(cells[metric]) for metric in metrics]
        if spread:
            means = first.get("by_seed", {}).values()
            line.append(f"{min(means):.3f}–{max(means):.3f}" if means else "")
        if asked:
            kept = exact.get("retention")
            line += [
                "" if kept is None else f"{kept:.2f}",
                *(_difference(exact.get(k)) for k in ("to_full", "to_bm25")),
            ]
        line += ["" if first[key] is None else f"{first[key]:.0f}" for key in ("encode_ms", "read_ms")]
        lines.append(_line(line))
    verdicts = [verdict(row) for row in rows if row["metric"] == "exact"] if asked else []
    if not asked:
        verdicts = [f"{task} asks nothing: the arms that need a question are left out."]
    return "\n".join([*lines, *(f"\n{text}" for text in verdicts if text)])


def verdict(row: dict[str, Any]) -> str:
    """Whether an arm with latents beats text of as many rows, in a sentence; nothing for the other arms."""
    beside = row.get("to_bm25")
    if row["condition"].partition("@")[0] not in _JUDGED or not beside:
        return ""
    how = "cannot be told apart from"
    if not beside["low"] <= 0 <= beside["high"]:
        how = "is better than" if beside["difference"] > 0 else "is worse than"
    size = row["condition"].partition("@")[2]
    interval = f"{beside['difference']:+.2f}, {beside['low']:+.2f} to {beside['high']:+.2f}"
    return f"`{row['condition']}` {how} `{BM25}@{size}`, text of as many rows: {interval}."


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _score(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.3f} ({cell['low']:.2f}–{cell['high']:.2f})" if cell["count"] else ""


def _difference(compared: dict[str, Any] | None) -> str:
    return f"{compared['difference']:+.3f} ({compared['p']:.3f})" if compared else ""


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each task and length: its first metric over the decoder's rows, a line an arm."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    figure = Figure(figsize=(0.6 + 3.6 * len(tasks), 0.8 + 3.2 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), len(tasks), squeeze=False)
    drawn: dict[str, Any] = {}
    for line, length in zip(panels, lengths, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            metric = TASKS[task].metrics[0]
            of_panel = [row for row in rows if (row["task"], row["length"], row["metric"]) == (task, length, metric)]
            drawn |= _draw_panel(axes, [row for row in of_panel if row["count"]])
            axes.set(title=f"{task} {length}".strip(), xlabel="decoder rows", ylabel=metric.replace("_", " "))
            if metric != _PERPLEXITY:
                axes.set_ylim(-0.03, 1.03)
    if drawn:
        kinds = sorted(drawn, key=_order)
        figure.legend([drawn[kind] for kind in kinds], kinds, loc="outside lower center", ncols=len(kinds))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of a panel, by the arm's kind."""
    drawn = {}
    for kind in dict.fromkeys(row["condition"].partition("@")[0] for row in rows):
        points = sorted(
            (row["decoder_rows"], row["mean"], row["low"], row["high"])
            for row in rows
            if row["condition"].partition("@")[0] == kind
        )
        places, means, lows, highs = zip(*points, strict=True)
        # A bootstrap bound may lie a rounding error on the wrong side of the mean.
        below = [max(0.0, mean - low) for mean, low in zip(means, lows, strict=True)]
        above = [max(0.0, high - mean) for mean, high in zip(means, highs, strict=True)]
        # Of one colour in every panel, whichever arms it has.
        number = KINDS.index(kind) if kind in KINDS else len(KINDS)
        style: dict[str, Any] = {"color": f"C{number}", "marker": "osD^vP*XH"[number], "capsize": 3}
        drawn[kind] = axes.errorbar(places, means, yerr=[below, above], **style)
        if kind in (NONE, FULL):
            # What the others lie between.
            axes.axhline(means[0], color=f"C{number}", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    return drawn


def _interval(values: Sequence[float], metric: str) -> dict[str, Any]:
    """Mean and 95 % interval: Wilson's for shares, else by bootstrap."""
    is_share = type(values[0]) is bool
    low, high = wilson(sum(values), len(values)) if is_share else bootstrap(values)
    interval = {"mean": fmean(values), "low": low, "high": high}
    if metric == _PERPLEXITY:
        interval = {name: _exp(value) for name, value in interval.items()}
    return {**interval, "count": len(values)}


def _exp(value: float) -> float:
    return math.exp(min(value, 50.0))
