"""All benchmarks of inference one after another, each in a process of its own, into one dated folder.

A benchmark whose result is in the folder already is not run again: an interrupted run goes on with the same --output.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from utils.benchmark.measure import machine, markdown_table
from utils.benchmark.results import RESULT_FILE, TABLE_FILE
from utils.errors import CodeLlavaError
from utils.files import PROJECT_ROOT, read_json, write_json, write_text
from utils.flags import add_checkpoint_flags

DESCRIPTION = "all but pooling and training into one folder; gateway only where its address is given"
QUICK: dict[str, Any] = {}
_NAMES = ("encode", "ttft", "memory", "cache", "load", "generate", "ruler")
# About twenty minutes on two cores in all, six of them for a million tokens.
_FLAGS = {
    "encode": ["--bare-batches", "1", "2", "4"],
    "memory": ["--tokens", "16384", "131072", "1048576"],
    "load": ["--repeats", "3"],
}
_PASSED_ON = ("checkpoint", "chunk_size", "device", "dtype", "attn_implementation", "batch_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--gateway-url", help="measure this gateway too")
    group.add_argument("--backend-url", help="the gateway's backend; needed with --gateway-url")
    parser.add_argument("--output", help="folder; default artifacts/benchmarks/<date and time>")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Run them.

    Returns:
        What was run and how long it took, and the results by name.

    Raises:
        CodeLlavaError: A benchmark failed; those before it are in the folder.
    """
    folder = Path(args.output or PROJECT_ROOT / "artifacts" / "benchmarks" / time.strftime("%Y%m%d-%H%M%S"))
    names = [*_NAMES, *(["gateway"] if args.gateway_url else [])]
    rows, results = [], {}
    for name in names:
        began = time.perf_counter()
        done = (folder / name / RESULT_FILE).is_file()
        if not done:
            _run_one(args, name, folder / name)
        results[name] = read_json(folder / name / RESULT_FILE)
        rows.append((name, "there already" if done else f"{time.perf_counter() - began:.0f}", f"{name}/{TABLE_FILE}"))
    table = markdown_table(("benchmark", "seconds", "table"), rows)
    tables = [(folder / name / TABLE_FILE).read_text(encoding="utf-8").replace("](", f"]({name}/") for name in names]
    write_text(folder / TABLE_FILE, "\n".join(tables))
    result = {"benchmark": "all", "folder": str(folder), "results": results, "machine": machine()}
    write_json(folder / RESULT_FILE, result)
    return f"{table}\n\nin {folder}", result


def _run_one(args: argparse.Namespace, name: str, folder: Path) -> None:
    flags = [] if args.quick else list(_FLAGS.get(name, []))
    for key in _PASSED_ON:
        if getattr(args, key) is not None:
            flags += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    flags += ["--quick"] if args.quick else []
    if name == "gateway":
        flags += ["--gateway-url", args.gateway_url]
        flags += ["--backend-url", args.backend_url] if args.backend_url else []
    command = [sys.executable, "-m", "utils.benchmark", name, *flags, "--output", str(folder)]
    # The table is in the folder; stdout stays for the end.
    done = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=PROJECT_ROOT, check=False)
    if done.returncode:
        raise CodeLlavaError(f"benchmark {name} failed (its message stands above); go on with --output {folder}")
