"""RULER rows a second: building them, answering them from text and from latents, scoring them.

Runs RULER's own commands as a person does. Building is `python -m ruler.bench_generation`, whose rates leave the start
of the process out; the other rates are whole commands over their rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.benchmark.measure import machine, markdown_table
from utils.errors import ConfigError
from utils.files import PROJECT_ROOT
from utils.flags import add_checkpoint_flags

if TYPE_CHECKING:
    from utils.checkpoint.layout import CheckpointFiles

DESCRIPTION = "RULER rows a second: building, answering, scoring"
QUICK = {"lengths": "1k", "tasks": "niah_single_1", "num_samples": 2, "answered_length": "1k", "answered_rows": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("building")
    group.add_argument("--tasks", default="ruler", help="names with commas, or ruler, code, all; default ruler")
    group.add_argument("--lengths", default="4k,128k", help="budgets in tokens; default 4k,128k")
    group.add_argument("--num-samples", type=int, default=3, help="rows of a task and length; default 3")
    group.add_argument("--data-dir", help="folder of the data files; default: built-in data")
    group = parser.add_argument_group("answering")
    group.add_argument("--answered-length", default="1k", help="budget of the rows that are answered; default 1k")
    group.add_argument("--answered-rows", type=int, default=2, help="rows of niah_single_2; 0 for none; default 2")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        Tables for people, and everything as one JSON-ready value.
    """
    from utils.checkpoint.locate import find_checkpoint

    files = find_checkpoint(args.checkpoint, args.chunk_size)
    built = _built(args, str(files.decoder))
    rows = [
        (row["task"], row["length"], f"{row['rows_per_s']:.1f}", f"{row['rows_per_cpu_s']:.1f}", f"{row['fill']:.3f}")
        for row in built["results"]
    ]
    table = markdown_table(("task", "length", "rows/s", "rows per CPU second", "fill"), rows)
    answered = _answered(args, files) if args.answered_rows else {}
    if answered:
        table += "\n\n" + markdown_table(
            ("command", "rows/s", "seconds"),
            [(name, f"{step['rows_per_s']:.2f}", f"{step['seconds']:.1f}") for name, step in answered.items()],
        )
    result = {
        "benchmark": "ruler",
        "building": built["results"],
        "commands": answered,
        "num_samples": args.num_samples,
        "config": files.config.to_json(),
        "machine": machine(),
    }
    return table, result


def _built(args: argparse.Namespace, tokenizer: str) -> dict[str, Any]:
    flags = ["--tokenizer-path", tokenizer, "--tasks", args.tasks, "--lengths", args.lengths, "--modes", "compat"]
    flags += ["--num-samples", str(args.num_samples), "--repeats", "1"]
    flags += ["--data-dir", args.data_dir] if args.data_dir else []
    return dict(json.loads(_run("ruler.bench_generation", *flags).splitlines()[-1]))


def _answered(args: argparse.Namespace, files: CheckpointFiles) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, text, memory = (str(folder / part) for part in ("data", "text", "memory"))
        rows = str(args.answered_rows)
        model = ["--model", str(files.root), "--device", args.device, "--data-dir", data]
        steps = {
            "prepare": [
                "prepare", "--output-dir", data, "--tasks", "niah_single_2", "--lengths", args.answered_length,
                "--num-samples", rows, "--tokenizer-path", str(files.decoder),
            ],
            "predict, full text": ["predict", *model, "--output-dir", text, "--backend", "local-text"],
            "predict, latents": [
                "predict", *model, "--output-dir", memory, "--backend", "local-memory",
                "--chunk-size", str(files.config.chunk_size), "--cache-dir", str(folder / "cache"),
            ],
            "score, both": ["score", text, memory],
        }  # fmt: skip
        results = {}
        for step, arguments in steps.items():
            began = time.perf_counter()
            _run("ruler", *arguments)
            seconds = time.perf_counter() - began
            count = args.answered_rows * (2 if step.startswith("score") else 1)
            results[step] = {"seconds": round(seconds, 2), "rows_per_s": round(count / seconds, 3)}
        return results


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=PROJECT_ROOT, check=False
    )
    if done.returncode:
        raise ConfigError(f"python -m {module} {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
