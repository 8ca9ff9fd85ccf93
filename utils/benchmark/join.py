"""The rows of cached windows joined to one prompt's latents: `utils/model/join.py` beside `torch.cat`.

Run it beside other work, too: it is there that the two differ most.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from utils.benchmark.measure import Timing, markdown_table, median_ratio, runs_of, time_interleaved
from utils.model.join import join_rows


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    ratios: dict[str, float] = {}
    timings: dict[str, Timing] = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = list(torch.randn(args.rows, args.width).to(dtype).split(args.window_rows))
        name = str(dtype).removeprefix("torch.")
        jobs = {f"torch.cat, {name}": lambda p=parts: torch.cat(p), f"join_rows, {name}": lambda p=parts: join_rows(p)}
        timings |= time_interleaved(jobs, args.repeats)
        plain = timings[f"torch.cat, {name}"]
        ratios |= {job: median_ratio(plain, timings[job]) for job in jobs}
    rows = [(job, f"{1e3 * t.median_s:.2f}", f"{ratios[job]:.2f}", f"{t.spread:.0%}") for job, t in timings.items()]
    return markdown_table(("job", "ms", "times as fast as torch.cat", "spread"), rows), {
        "times_torch": ratios,
        "runs_s": runs_of(timings),
    }
