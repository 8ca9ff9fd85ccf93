"""The benchmarks' pictures, drawn from their results; each function returns a matplotlib figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ttft_by_length(cases: Sequence[dict[str, Any]]) -> Figure:
    """Time to the first token against memory length: full text, latents, cached latents, and their ideal lines.

    Args:
        cases: Of the ttft benchmark, alike but for their length and whether latents were cached.
    """
    figure, axes = _figure()
    fresh = [case for case in cases if not case["cached"]]
    _line(axes, fresh, "full text", "full_runs_s")
    for cached, label in ((False, "latents, encoded"), (True, "latents, cached")):
        chosen = [case for case in cases if case["cached"] == cached]
        colour = _line(axes, chosen, label, "runs_s")
        tokens = [case["tokens"] for case in chosen]
        ideal = [statistics.median(case["full_runs_s"]) / case["ideal_parts"] for case in chosen]
        axes.plot(tokens, ideal, linestyle="--", color=colour, alpha=0.7, label=f"{label}: ideal")
    axes.set(xlabel="memory tokens", ylabel="seconds to the first token", xscale="log", yscale="log")
    lengths = sorted({case["tokens"] for case in cases})
    axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axes.xaxis.minorticks_off()
    axes.legend(fontsize="small")
    return figure


def throughput_by_spans(result: dict[str, Any]) -> Figure:
    """Encoding throughput against the number of spans, beside the best bare forward."""
    figure, axes = _figure()
    speeds = result["tokens_per_s"]
    spans = {int(name.split()[0]): speed for name, speed in speeds.items() if name.endswith("spans")}
    bare = max(speed for name, speed in speeds.items() if name.startswith("bare"))
    positions = range(len(spans))
    axes.bar(positions, list(spans.values()), width=0.6, label="spans, packed")
    axes.axhline(bare, color="black", linestyle="--", label="bare encoder forward at its best batch shape")
    axes.set_xticks(positions, labels=[f"{count:,}" for count in spans])
    axes.set(xlabel=f"spans that {result['tokens']:,} tokens are cut into", ylabel="tokens per second", ylim=(0, None))
    axes.legend(fontsize="small", loc="lower right")
    return figure


def memory_by_length(rows: Sequence[dict[str, Any]]) -> Figure:
    """Peak memory against the tokens that were encoded."""
    figure, axes = _figure()
    tokens = [row["tokens"] for row in rows]
    for key, label in (
        ("peak_bytes", "peak"),
        ("loaded_bytes", "before encoding: program, weights, tokens"),
        ("latent_bytes", "latents alone"),
    ):
        axes.plot(tokens, [row[key] / 2**20 for row in rows], marker="o", label=label)
    axes.set(xlabel="memory tokens", ylabel="MiB", xscale="log", ylim=(0, None))
    axes.set_xticks(tokens, labels=[f"{count:,}" for count in tokens])
    axes.xaxis.minorticks_off()
    axes.legend(fontsize="small")
    return figure


def _line(axes: Axes, cases: Sequence[dict[str, Any]], label: str, key: str) -> Any:
    """Medians with the fastest and the slowest run as bars; returns the line's colour."""
    medians = [statistics.median(case[key]) for case in cases]
    below = [middle - min(case[key]) for middle, case in zip(medians, cases, strict=True)]
    above = [max(case[key]) - middle for middle, case in zip(medians, cases, strict=True)]
    tokens = [case["tokens"] for case in cases]
    bars = axes.errorbar(tokens, medians, yerr=(below, above), marker="o", capsize=3, label=label)
    return bars.lines[0].get_color()


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
