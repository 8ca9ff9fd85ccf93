"""Encoding speed beside its limit: the bare encoder forward of as many tokens at its best batch shape.

The memory is real Python source, cut into 1, 20, 200 and 2000 spans of mixed lengths: the mix should cost nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from utils.benchmark.measure import markdown_table, median_ratio, runs_of, time_interleaved
from utils.benchmark.sources import bare_encoder, bare_forward, cut_into_spans, load_compressor, source_tokens


@torch.inference_mode()
def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    compressor = load_compressor(args)
    encoder, config = compressor.memory_encoder, compressor.files.config
    tokens = source_tokens(compressor.processor.tokenizers.encoder, args.tokens)
    bare = bare_encoder(compressor)
    jobs: dict[str, Callable[[], Any]] = {
        f"bare forward, {batch} windows": bare_forward(bare, tokens, config.window, batch)
        for batch in args.bare_batches
    }
    for count in args.spans:
        jobs[f"{count} spans"] = partial(encoder, cut_into_spans(tokens, count, config.chunk_size))
    timings = time_interleaved(jobs, args.repeats, encoder.chunker.device)
    best = min((t for name, t in timings.items() if name.startswith("bare")), key=lambda t: t.median_s)
    speed = {name: args.tokens / timing.median_s for name, timing in timings.items()}
    ratio = {name: median_ratio(best, timing) for name, timing in timings.items()}
    rows = [
        (name, f"{t.median_s:.3f}", f"{speed[name]:.0f}", f"{ratio[name]:.3f}", f"{t.spread:.0%}")
        for name, t in timings.items()
    ]
    figures = {
        "tokens_per_s": speed,
        "ratio_to_bare": ratio,
        "runs_s": runs_of(timings),
        "config": config.to_json(),
    }
    return markdown_table(("job", "seconds", "tokens/s", "× best bare forward", "spread"), rows), figures
