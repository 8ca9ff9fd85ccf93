"""The report's pictures, drawn from scored runs; each function returns a matplotlib figure.

A scored run is what `score.score_run` returns. Lengths are placed by rank, not by size, so that short ones keep their
room.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ruler.registry import TASKS
from ruler.scoring.metrics import THRESHOLD
from utils.files import atomic_path

Run = Mapping[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_MAP = "YlGnBu"
_DEPTH_BINS = 10
_MOST_ACROSS = 6


def write_figures(runs: Sequence[Run], folder: Path) -> list[str]:
    """Draw all pictures for which there is data.

    Returns:
        The names of the PNG files written into `folder`.
    """
    figures = {
        "score_by_length": score_by_length(runs),
        "tasks_by_length": tasks_by_length(runs),
        "needle_depth_by_length": needle_depth_by_length(runs),
        "score_by_ratio": score_by_ratio(runs),
        "score_by_rows": score_by_rows(runs),
    }
    names = []
    for name, figure in figures.items():
        if figure is None:
            continue
        with mpl.rc_context({"svg.hashsalt": name}), atomic_path(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        names.append(f"{name}.png")
    return names


def score_by_length(runs: Sequence[Run]) -> Figure | None:
    """Mean score over the tasks against context length, one line a run, with RULER's threshold."""
    curves = {run["name"]: [e for e in run["lengths"] if e["length"] and e["score"] is not None] for run in runs}
    lengths = sorted({e["length"] for entries in curves.values() for e in entries})
    if not lengths:
        return None
    figure, axes = _figure()
    for number, (name, entries) in enumerate((name, entries) for name, entries in curves.items() if entries):
        points = [(lengths.index(e["length"]), e["score"], e["score_interval"]) for e in entries]
        _draw_curve(axes, number, name, points)
    axes.axhline(THRESHOLD, color="#666666", linestyle="--", linewidth=1)
    label = f"threshold {THRESHOLD}"
    axes.annotate(label, (0.99, THRESHOLD + 1), xycoords=("axes fraction", "data"), ha="right", fontsize=8)
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axes.set(xlabel="context length (tokens)", ylabel="mean score", ylim=(-2, 104), title="Score against length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def tasks_by_length(runs: Sequence[Run]) -> Figure | None:
    """Tasks × lengths heat map, one panel a run."""
    tasks = [name for name in TASKS if any(name in e["tasks"] for run in runs for e in run["lengths"])]
    if not tasks:
        return None
    lengths = _lengths(runs)
    grids = []
    for run in runs:
        scores = {(e["length"] or 0, task): of["score"] for e in run["lengths"] for task, of in e["tasks"].items()}
        grids.append([[scores.get((length, task), math.nan) for length in lengths] for task in tasks])
    return _heat_maps("Score by task and length", runs, grids, tasks, lengths)


def needle_depth_by_length(runs: Sequence[Run]) -> Figure | None:
    """Share of needles found, by their depth in the context and its length, over all NIAH tasks; one panel a run."""
    lengths = _lengths(runs)
    shown, grids = [], []
    for run in runs:
        hits: dict[tuple[int, int], list[float]] = defaultdict(list)
        for entry in run["lengths"]:
            for scores in entry["tasks"].values():
                for depth, hit in scores.get("needles", ()):
                    hits[min(int(depth * _DEPTH_BINS), _DEPTH_BINS - 1), entry["length"] or 0].append(hit)
        if hits:
            shown.append(run)
            grids.append([[_percent(hits.get((b, length))) for length in lengths] for b in range(_DEPTH_BINS)])
    if not shown:
        return None
    rows = [f"{100 * b // _DEPTH_BINS}–{100 * (b + 1) // _DEPTH_BINS} %" for b in range(_DEPTH_BINS)]
    return _heat_maps("Needles found, by depth and length", shown, grids, rows, lengths)


def score_by_ratio(runs: Sequence[Run]) -> Figure | None:
    """Mean score against measured compression ratio (memory tokens a latent; text is 1), one line a length."""
    points: dict[int, list[tuple[float, float, Any]]] = defaultdict(list)
    for run in runs:
        for entry in run["lengths"]:
            if entry["score"] is not None and entry["ratio"] is not None:
                points[entry["length"] or 0].append((entry["ratio"], entry["score"], entry["score_interval"]))
    if len({round(ratio, 1) for series in points.values() for ratio, _, _ in series}) < 2:
        return None
    figure, axes = _figure()
    for number, length in enumerate(sorted(points)):
        series = sorted(points[length], key=lambda point: point[:2])
        _draw_curve(axes, number, _short(length) if length else "all rows", series)
    axes.set_xscale("log", base=2)
    ticks = sorted({2 ** round(math.log2(max(ratio, 1))) for series in points.values() for ratio, _, _ in series})
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set(xlabel="memory tokens a latent (1 = text)", ylabel="mean score", ylim=(-2, 104))
    axes.set_title("Score against compression ratio")
    axes.legend(frameon=False, fontsize=8, title="context length")
    return figure


def score_by_rows(runs: Sequence[Run]) -> Figure | None:
    """Mean score against the rows that the decoder reads, one line an arm; a panel a length. None without arms."""
    curves: dict[int, dict[str, list[tuple[float, float, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        kind = (run["settings"].get("arm") or "").partition("@")[0]
        for entry in run["lengths"]:
            if kind and entry["score"] is not None and entry["tokens_after"] is not None:
                point = entry["tokens_after"], entry["score"], entry["score_interval"]
                curves[entry["length"] or 0][kind].append(point)
    if not curves:
        return None
    figure = Figure(figsize=(max(6.4, 4.2 * len(curves)), 4.0), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(curves), squeeze=False)[0], sorted(curves), strict=True):
        for number, (kind, points) in enumerate(curves[length].items()):
            _draw_curve(axes, number, kind, sorted(points, key=lambda point: point[:2]))
        axes.set_xscale("log", base=2)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set(xlabel="rows that the decoder reads", ylabel="mean score", ylim=(-2, 104))
        axes.set_title(f"{_short(length)} tokens" if length else "all rows")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Score against decoder rows")
    return figure


def _heat_maps(
    title: str, runs: Sequence[Run], grids: Sequence[list[list[float]]], rows: Sequence[str], lengths: Sequence[int]
) -> Figure:
    columns = [_short(length) if length else "–" for length in lengths]
    # As many side by side as a page shows, and those of one line about as many as those of the next.
    across = math.ceil(len(runs) / math.ceil(len(runs) / _MOST_ACROSS))
    down = math.ceil(len(runs) / across)
    width = 1.9 + across * max(1.6, 0.62 * len(columns))
    figure = Figure(figsize=(max(5.0, width), 0.6 + down * (0.9 + 0.3 * len(rows))), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel().tolist()
    while len(panels) > len(runs):
        panels.pop().remove()
    colours = mpl.colormaps[_MAP].with_extremes(bad="#eeeeee")  # not run
    for axes, run, grid in zip(panels, runs, grids, strict=True):
        image = axes.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xlabel("context length (tokens)", fontsize=8)
        axes.set_title(run["name"], fontsize=9)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    ink = "white" if value > 60 else "black"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=panels, shrink=0.8, label="score")
    figure.suptitle(title)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curve(axes: Axes, number: int, label: str, points: Sequence[tuple[float, float, Any]]) -> None:
    """Draw (x, score, interval) with bars for the intervals; no bar where one is unknown."""
    x, scores, intervals = zip(*points, strict=True)
    below = [max(0.0, score - sure["low"]) if sure else 0.0 for score, sure in zip(scores, intervals, strict=True)]
    above = [max(0.0, sure["high"] - score) if sure else 0.0 for score, sure in zip(scores, intervals, strict=True)]
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "capsize": 3}
    axes.errorbar(x, scores, yerr=[below, above], label=label, **style)


def _lengths(runs: Sequence[Run]) -> list[int]:
    """All lengths of some runs; 0 where a run says none."""
    return sorted({e["length"] or 0 for run in runs for e in run["lengths"]})


def _percent(hits: Sequence[float] | None) -> float:
    return 100 * sum(hits) / len(hits) if hits else math.nan


def _short(length: int) -> str:
    """131072 → 128k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
