"""The rows of cached windows joined to one prompt's latents: `utils/model/join.py` beside `torch.cat`.

Run it beside other work, too: it is there that the two differ most.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from utils.benchmark.measure import markdown_table, median_ratio, runs_of, time_interleaved
from utils.model.join import join_rows


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    rows, timings = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = list(torch.randn(args.rows, args.width).to(dtype).split(args.window_rows))
        name = str(dtype).removeprefix("torch.")
        jobs = {f"torch.cat, {name}": lambda p=parts: torch.cat(p), f"join_rows, {name}": lambda p=parts: join_rows(p)}
        timings |= time_interleaved(jobs, args.repeats)
        plain = timings[f"torch.cat, {name}"]
        rows += [
            (job, f"{1e3 * timings[job].median_s:.2f}", f"{median_ratio(plain, timings[job]):.2f}") for job in jobs
        ]
    ratios = {job: ratio for job, _, ratio in rows}
    return markdown_table(("job", "ms", "× torch.cat"), rows), {"times_torch": ratios, "runs_s": runs_of(timings)}
