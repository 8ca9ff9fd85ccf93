"""From the command to its first output, beside the least that it could take.

The command is `general/step1_raw_text.py` on a short prompt. The least is a process that imports torch and transformers
and loads the encoder with `AutoModel`. Every run is a process of its own, in turns; the target is 1.3 × the least.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from utils.benchmark.measure import Timing, machine, markdown_table, median_ratio
from utils.errors import ConfigError
from utils.files import PROJECT_ROOT
from utils.flags import add_checkpoint_flags
from utils.model.markers import wrap

DESCRIPTION = "time from the command to its first output, beside bare imports and the encoder"
QUICK = {"repeats": 1}
TARGET = 1.3
_PROMPT = f"Explain {wrap('def f(): return 1')}"
_IMPORTS = "import torch, transformers"
_LEAST = f"""{_IMPORTS}
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], dtype="auto", trust_remote_code=False, local_files_only=True)
print("loaded", flush=True)"""
_IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--repeats", type=int, default=5, help="counted rounds, after one to warm up; default 5")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        A table for people, and everything as one JSON-ready value, with the dearest imports of the command.
    """
    from utils.checkpoint.locate import find_checkpoint

    files = find_checkpoint(args.checkpoint, args.chunk_size)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "general/step1_raw_text.py", "--text", _PROMPT, "--no-cache", "--output", str(Path(folder) / "embeds.npy"),
            "--model-path", str(files.root), "--chunk-size", str(files.config.chunk_size), "--device", args.device,
            "--dtype", args.dtype,
        ]  # fmt: skip
        jobs = {
            "imports of torch and transformers": ["-c", f"{_IMPORTS}\nprint('imported', flush=True)"],
            "the same and the encoder": ["-c", _LEAST, str(files.encoder)],
            "general/step1_raw_text.py": command,
        }
        runs: dict[str, list[float]] = {name: [] for name in jobs}
        for number in range(args.repeats + 1):
            for name, arguments in jobs.items():
                seconds = _seconds_to_output(arguments)
                if number:
                    runs[name].append(seconds)
        dearest = _dearest_imports(command)
    timings = {name: Timing(runs_s=tuple(seconds)) for name, seconds in runs.items()}
    least, ours = list(timings.values())[1:]
    rows = [
        (name, f"{t.median_s:.2f}", f"{median_ratio(t, least):.2f}", f"{t.spread:.0%}") for name, t in timings.items()
    ]
    table = markdown_table(("to first output", "seconds", "× imports and encoder", "spread"), rows)
    imports = markdown_table(("import, with all that it imports", "ms"), dearest)
    result = {
        "benchmark": "load",
        "runs_s": runs,
        "ratio": round(median_ratio(ours, least), 3),
        "target": TARGET,
        "imports_ms": dict(dearest),
        "dtype": args.dtype,
        "config": files.config.to_json(),
        "machine": machine(),
    }
    return f"{table}\n\nThe command's dearest imports:\n\n{imports}", result


def _seconds_to_output(arguments: list[str]) -> float:
    """From the start of a process to its first line on stdout."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT_ROOT
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        _, errors = process.communicate()
    if process.returncode or not line:
        raise ConfigError(f"{arguments[0]} failed with exit code {process.returncode}: {errors.strip()[-500:]}")
    return seconds


def _dearest_imports(command: list[str], count: int = 12) -> list[tuple[str, float]]:
    """Our own modules and the packages that they import at first hand, with milliseconds, the dearest first."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=PROJECT_ROOT, check=True
    )
    found = {m[4]: int(m[2]) / 1e3 for line in done.stderr.splitlines() if (m := _IMPORT_LINE.match(line))}
    chosen = [
        (name, ms) for name, ms in found.items() if name.count(".") == 0 or name.startswith(("utils.", "general."))
    ]
    return sorted(chosen, key=lambda item: -item[1])[:count]
