"""`python -m ruler.bench_generation`: rows a second of every task, length and mode, as a Markdown table.

Each number is the median of whole runs with other seeds, in one process that has tokenizer and data loaded; the first
run of a task, which loads them and counts its texts for the first time, is measured apart. CPU seconds are those of
all threads: what a busy machine does not change. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from typing import Any

from ruler.generation.prepare import parse_lengths
from ruler.registry import resolve_tasks
from utils.cli import make_parser, print_json, run_command
from utils.files import provenance

EXAMPLES = """\
  python -m ruler.bench_generation --tokenizer-path models/Qwen3-4B --lengths 4k,32k,128k --num-samples 20"""


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = make_parser("Measure RULER row generation.", EXAMPLES, "python -m ruler.bench_generation")
    parser.add_argument("--tokenizer-path", required=True, help="tokenizer folder, file or hub id")
    parser.add_argument("--tasks", default="all", help="task names with commas, or ruler, code, all (default: all)")
    parser.add_argument("--lengths", default="4k,32k,128k", help="budgets in tokens (default: 4k,32k,128k)")
    parser.add_argument("--modes", default="compat,balanced", help="modes with commas (default: both)")
    parser.add_argument("--num-samples", type=int, default=20, help="rows a run (default: 20)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median counts (default: 3)")
    parser.add_argument("--data-dir", help="folder of the data files (default: built-in data)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, then print table and JSON."""
    results = [
        _measure(args, task, length, mode)
        for mode in args.modes.split(",")
        for length in parse_lengths(args.lengths)
        for task in resolve_tasks(args.tasks)
    ]
    print(
        "| mode | length | task | first run, s | rows/s | rows per CPU second | fill |\n"
        "|---|---:|---|---:|---:|---:|---:|"
    )
    for item in results:
        print(
            f"| {item['mode']} | {item['length']} | {item['task']} | {item['first_s']:.2f} "
            f"| {item['rows_per_s']:.1f} | {item['rows_per_cpu_s']:.1f} | {item['fill']:.3f} |"
        )
    machine = {"processor": _processor(), "cores": os.cpu_count()}
    packages = ("tokenizers", "numpy", "wonderwords")
    print_json({"results": results, "num_samples": args.num_samples, **machine, **provenance(packages)})
    return 0


def _measure(args: argparse.Namespace, task: str, length: int, mode: str) -> dict[str, Any]:
    from ruler.generation.generate import Recipe, generate_rows

    seconds, cpu_seconds, lengths = [], [], [0]
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
        started, cpu_started = time.perf_counter(), time.process_time()
        lengths = [row["length"] for row in generate_rows(recipe)]
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    first, *others = seconds
    return {
        "task": task,
        "length": length,
        "mode": mode,
        "first_s": round(first, 3),
        "rows_per_cpu_s": round(args.num_samples / statistics.median(cpu_seconds[1:]), 2),
        "rows_per_s": round(args.num_samples / statistics.median(others), 2),
        "fill": round(statistics.mean(lengths) / length, 4),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:  # noqa: PTH123 - not a file of ours
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
