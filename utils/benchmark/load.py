"""From the command to its first output, beside the least that it could take.

The command is `general/step1_raw_text.py` on a short prompt. The least is a process that imports torch and transformers
and loads the encoder with `AutoModel`. Every run is a process of its own, in turns; the target is 1.3 × the least.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from utils.benchmark.measure import markdown_table, median_ratio, runs_of, time_interleaved
from utils.checkpoint.locate import find_checkpoint
from utils.errors import ConfigError
from utils.files import PROJECT_ROOT
from utils.model.markers import wrap

_IMPORTS = "import torch, transformers"
_LEAST = f"""{_IMPORTS}
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], dtype="auto", trust_remote_code=False, local_files_only=True)
print("loaded", flush=True)"""


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    files = find_checkpoint(args.checkpoint, args.chunk_size)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "general/step1_raw_text.py", "--text", f"Explain {wrap('def f(): return 1')}", "--no-cache",
            "--output", str(Path(folder) / "embeds.npy"), "--checkpoint", str(files.root),
            "--chunk-size", str(files.config.chunk_size), "--device", args.device, "--dtype", args.dtype,
        ]  # fmt: skip
        jobs = {
            "imports of torch and transformers": ["-c", f"{_IMPORTS}\nprint('imported', flush=True)"],
            "the same and the encoder": ["-c", _LEAST, str(files.encoder)],
            "general/step1_raw_text.py": command,
        }
        timings = time_interleaved({name: partial(_run_to_output, words) for name, words in jobs.items()}, args.repeats)
    _, least, ours = timings.values()
    rows = [
        (name, f"{t.median_s:.2f}", f"{median_ratio(t, least):.2f}", f"{t.spread:.0%}") for name, t in timings.items()
    ]
    figures = {"ratio": median_ratio(ours, least), "runs_s": runs_of(timings), "config": files.config.to_json()}
    return markdown_table(("to first output", "seconds", "× imports and encoder", "spread"), rows), figures


def _run_to_output(arguments: list[str]) -> None:
    """Start a process and wait for its first line on stdout; what it does after that is cut short."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT_ROOT
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise ConfigError(f"{arguments[0]} wrote nothing: {process.communicate()[1].strip()[-500:]}")
        process.kill()
