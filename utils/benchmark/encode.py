"""Encoding speed beside its limit: the bare encoder forward of as many tokens at its best batch shape.

The memory is real Python source, cut into 1, 20, 200 and 2000 spans of mixed lengths: the mix should cost nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.benchmark.material import SEED, bare_encoder, bare_forward, cut_into_spans, load_compressor, source_tokens
from utils.benchmark.measure import Timing, finished, machine, markdown_table, median_ratio, time_interleaved
from utils.flags import add_checkpoint_flags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DESCRIPTION = "encoder throughput for mixed spans, beside the bare encoder forward"
QUICK = {"tokens": 1024, "spans": [1, 20], "bare_batches": [1, 2], "repeats": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--tokens", type=int, default=16384, help="memory tokens; default 16384")
    group.add_argument("--spans", type=int, nargs="+", default=[1, 20, 200, 2000], help="default 1 20 200 2000")
    group.add_argument("--bare-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="windows a bare forward")
    group.add_argument("--compile", action="store_true", help="compile the packed encoder; the bare one stays as it is")
    group.add_argument("--repeats", type=int, default=5, help="counted rounds; default 5")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        A table for people, and everything as one JSON-ready value.
    """
    import torch

    compressor = load_compressor(args, compiled=args.compile)
    encoder = compressor.memory_encoder
    config, device = compressor.files.config, encoder.chunker.device
    tokens = source_tokens(compressor.processor.tokenizers.encoder, args.tokens)
    bare = bare_encoder(compressor)
    with torch.inference_mode():
        jobs: dict[str, Callable[[], Any]] = {
            f"bare forward, {batch} windows": finished(bare_forward(bare, tokens, config.window, batch), device)
            for batch in args.bare_batches
        }
        for count in args.spans:
            spans = cut_into_spans(tokens, count, config.chunk_size)
            jobs[f"{count} spans"] = finished(partial(encoder, spans), device)
        timings = time_interleaved(jobs, args.repeats)
    return _report(args, timings, config.to_json())


def _report(args: argparse.Namespace, timings: dict[str, Timing], config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    bare = min((t for name, t in timings.items() if name.startswith("bare")), key=lambda t: t.median_s)
    rows = [
        (
            name,
            f"{timing.median_s:.3f}",
            f"{args.tokens / timing.median_s:.0f}",
            f"{median_ratio(bare, timing):.3f}",
            f"{timing.spread:.0%}",
        )
        for name, timing in timings.items()
    ]
    table = markdown_table(("job", "seconds", "tokens/s", "× best bare forward", "spread"), rows)
    result = {
        "benchmark": "encode",
        "tokens": args.tokens,
        "dtype": args.dtype,
        "compiled": args.compile,
        "config": config,
        "seed": SEED,
        "tokens_per_s": {name: round(args.tokens / timing.median_s, 1) for name, timing in timings.items()},
        "runs_s": {name: timing.runs_s for name, timing in timings.items()},
        "ratio_to_bare": {name: round(median_ratio(bare, timing), 4) for name, timing in timings.items()},
        "machine": machine(),
    }
    return table, result


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Throughput against the number of spans, with the bare forward as a line."""
    from utils.benchmark.figures import throughput_by_spans

    return {"throughput_by_spans": throughput_by_spans(result)}
