"""RULER rows a second of every task, length and mode.

Each number is the median of whole runs with other seeds, in one process that has tokenizer and data loaded; the first
run of a task, which loads them and counts its texts for the first time, is measured apart. CPU seconds are those of
all threads: what a busy machine does not change.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from ruler.generation.generate import Recipe, generate_rows
from ruler.registry import parse_lengths, resolve_tasks
from utils.benchmark.measure import markdown_table
from utils.checkpoint.locate import find_checkpoint
from utils.errors import ConfigError


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    if min(args.num_samples, args.repeats) < 1:
        raise ConfigError("--num-samples and --repeats must be at least 1")
    args.tokenizer_path = args.tokenizer_path or str(find_checkpoint(None).decoder)
    found = [
        _measure(args, task, length, mode)
        for mode in args.modes.split(",")
        for length in parse_lengths(args.lengths)
        for task in resolve_tasks(args.tasks)
    ]
    rows = [
        (
            row["mode"],
            row["length"],
            row["task"],
            f"{row['first_s']:.2f}",
            f"{row['rows_per_s']:.1f}",
            f"{row['rows_per_cpu_s']:.1f}",
            f"{row['fill']:.3f}",
        )
        for row in found
    ]
    header = ("mode", "length", "task", "first run, s", "rows/s", "rows per CPU second", "fill")
    return markdown_table(header, rows), {"results": found}


def _measure(args: argparse.Namespace, task: str, length: int, mode: str) -> dict[str, Any]:
    seconds, cpu_seconds, lengths = [], [], []
    for repeat in range(args.repeats + 1):
        recipe = Recipe(
            task=task,
            max_seq_length=length,
            tokenizer=args.tokenizer_path,
            num_samples=args.num_samples,
            seed=42 + repeat,  # other texts each time, or they would be counted already
            mode=mode,
            data_dir=args.data_dir,
        )
        began, cpu_began = time.perf_counter(), time.process_time()
        lengths = [row["length"] for row in generate_rows(recipe)]
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    return {
        "task": task,
        "length": length,
        "mode": mode,
        "first_s": seconds[0],
        "rows_per_s": args.num_samples / statistics.median(seconds[1:]),
        "rows_per_cpu_s": args.num_samples / statistics.median(cpu_seconds[1:]),
        "fill": statistics.mean(lengths) / length,
    }
