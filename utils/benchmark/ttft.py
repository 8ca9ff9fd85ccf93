"""Time to the first token with latents in place of text, beside the same decoder on the full text.

S = time with the full text / time with latents, both from the prompt as a string to the first token's id, in turns on
one machine. Two ideals stand beside it:

    by operations   S of `utils.training.flops`: what the counts allow on a machine that does all of them equally fast
    by parts        decoder on the full text / (bare encoder and adapter + decoder on the short prompt), each of them
                    measured alone in the same rounds: what this machine allows; the target is 0.9 of it

For cached latents the encoder's part is nothing. Every flag `--also-…` varies one thing and leaves the others at their
base value; with `--product` all of them are combined.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.benchmark.material import SEED
from utils.benchmark.measure import machine, markdown_table
from utils.benchmark.ttft_cases import Group, plan
from utils.checkpoint.settings import DTYPE_NAMES
from utils.flags import add_checkpoint_flags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DESCRIPTION = "time to the first token, compressed beside full text"
QUICK: dict[str, Any] = {
    "tokens": 256, "also_tokens": [512], "also_chunk_sizes": [], "also_spans": [4], "also_dtypes": [],
    "also_batches": [2], "repeats": 1,
}  # fmt: skip
STAGES = ("tokenise", "encode", "project", "splice", "serialise", "prefill")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("base")
    group.add_argument("--tokens", type=int, default=1024, help="memory tokens; default 1024")
    group.add_argument("--spans", type=int, default=1, help="spans that the memory is cut into; default 1")
    group.add_argument("--batch", type=int, default=1, help="prompts at once; default 1")
    sweep = parser.add_argument_group("sweeps")
    sweep.add_argument("--also-tokens", type=int, nargs="*", default=[2048, 4096, 8000], help="default 2048 4096 8000")
    sweep.add_argument("--also-chunk-sizes", type=int, nargs="*", default=[4, 8, 16, 32], help="default 4 8 16 32")
    sweep.add_argument("--also-spans", type=int, nargs="*", default=[16, 64], help="default 16 64")
    sweep.add_argument("--also-dtypes", nargs="*", choices=DTYPE_NAMES, default=["float32"], help="default float32")
    sweep.add_argument("--also-batches", type=int, nargs="*", default=[4], help="default 4")
    sweep.add_argument("--product", action="store_true", help="combine all values with each other")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--repeats", type=int, default=3, help="counted rounds; default 3")
    group.add_argument("--server-url", help="prefill on this server, which serves the checkpoint's decoder")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        Tables for people, and everything as one JSON-ready value.
    """
    from utils.benchmark.ttft_subject import Subject
    from utils.checkpoint.locate import find_checkpoint
    from utils.compress.latent_cache import LatentCache

    if args.chunk_size is None:
        args.chunk_size = find_checkpoint(args.checkpoint).config.chunk_size
    groups = plan(args)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        for dtype in dict.fromkeys(group.dtype for group in groups):
            with Subject.open(args, dtype, cache) as subject:
                mine = [group for group in groups if group.dtype == dtype]
                subject.check_room(mine)
                for group in mine:
                    measured += _measure(subject, group, args.repeats)
                config = subject.config.to_json()
    measured.sort(key=lambda case: [case[key] for key in ("dtype", "batch", "chunk_size", "spans", "tokens", "cached")])
    result = {
        "benchmark": "ttft",
        "prefill": "server, transfer included" if args.server_url else "in this process",
        "base": {"tokens": args.tokens, "spans": args.spans, "batch": args.batch, "dtype": args.dtype},
        "cases": measured,
        "config": config,
        "repeats": args.repeats,
        "seed": SEED,
        "machine": machine(),
    }
    return f"{_table(measured)}\n\nMilliseconds of each stage (medians):\n\n{_stage_table(measured)}", result


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Time to the first token against length, at the base values."""
    from utils.benchmark.figures import ttft_by_length

    base = result["base"]
    size = result["config"]["compression_ratio"]
    chosen = [
        case
        for case in result["cases"]
        if case["chunk_size"] == size and all(case[key] == base[key] for key in ("spans", "batch", "dtype"))
    ]
    return {"ttft_by_length": ttft_by_length(chosen)} if len(chosen) > 2 else {}


def _measure(subject: Any, group: Group, repeats: int) -> list[dict[str, Any]]:
    from utils.benchmark.measure import time_interleaved

    jobs = subject.jobs(group)
    timings = time_interleaved(jobs, repeats)
    # The warm-up's stages are not counted.
    stages = {name: job.runs[-repeats:] for name, job in jobs.items()}
    full = stages["full text"]
    alone = timings["encoder alone"].runs_s
    rows = []
    for case in group.cases:
        facts = subject.facts(group, case)
        short = timings[f"decoder alone, {facts['prompt_rows']} rows"].runs_s
        for cached in (False, True):
            mine = stages[subject.job_name(case, cached)]
            runs, full_runs = [_total(r, subject.has_server) for r in mine], [_total(r, False) for r in full]
            speedups = [a / b for a, b in zip(full_runs, runs, strict=True)]
            parts = [
                whole["prefill"] / (decoder + (0 if cached else encoder))
                for whole, encoder, decoder in zip(full, alone, short, strict=True)
            ]
            rows.append(
                {
                    **facts,
                    "cached": cached,
                    "speedup": statistics.median(speedups),
                    "ideal_operations": facts["ideal_cached" if cached else "ideal"],
                    "ideal_parts": statistics.median(parts),
                    "of_ideal_parts": statistics.median(s / p for s, p in zip(speedups, parts, strict=True)),
                    "full_runs_s": full_runs,
                    "runs_s": runs,
                    "stages_s": {name: statistics.median(r.get(name, 0.0) for r in mine) for name in STAGES},
                    "full_stages_s": {name: statistics.median(r.get(name, 0.0) for r in full) for name in STAGES},
                }
            )
    return rows


def _total(stages: dict[str, float], has_server: bool) -> float:
    """Seconds to the first token; rows are serialised for a server only."""
    return sum(seconds for name, seconds in stages.items() if has_server or name != "serialise")


_KEYS = ("tokens", "chunk_size", "spans", "dtype", "batch")
_HEADER = ("tokens", "chunk", "spans", "dtype", "batch", "latents")


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return (*(case[key] for key in _KEYS), "cached" if case["cached"] else "encoded")


def _table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            *_key(case),
            case["prompt_rows"],
            _milliseconds(statistics.median(case["full_runs_s"])),
            _milliseconds(statistics.median(case["runs_s"])),
            f"{case['speedup']:.2f}",
            f"{case['ideal_operations']:.2f}",
            f"{case['ideal_parts']:.2f}",
            f"{case['of_ideal_parts']:.2f}",
            f"{(max(case['runs_s']) - min(case['runs_s'])) / statistics.median(case['runs_s']):.0%}",
        )
        for case in cases
    ]
    measured = ("rows", "full text ms", "ms", "S", "ideal S by operations", "by parts", "S / ideal by parts", "spread")
    return markdown_table((*_HEADER, *measured), rows)


def _stage_table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [(*_key(case), *(_milliseconds(case["stages_s"][name]) for name in STAGES)) for case in cases]
    return markdown_table((*_HEADER, *STAGES), rows)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
