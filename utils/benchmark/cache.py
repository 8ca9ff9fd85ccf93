"""Prompt → embeddings with the latent cache: text that is known, beside the same text encoded.

The memory is real Python source in one prompt of several files. Parsing the text, which is tokenising and nothing that
a cache of latents could save, is timed on its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from utils.benchmark.measure import markdown_table, median_ratio, runs_of, time_interleaved
from utils.benchmark.sources import cut_into_texts, load_compressor, marked, source_tokens
from utils.compress.latent_cache import LatentCache


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        encoding = load_compressor(args)
        cached = load_compressor(args, cache)
        tokenizer = encoding.processor.tokenizers.encoder
        text = marked(cut_into_texts(tokenizer, source_tokens(tokenizer, args.tokens), args.spans))
        prompt = encoding.parse_raw(text)
        jobs: dict[str, Callable[[], Any]] = {
            "encoded": lambda: encoding.compress([prompt]),
            "cached": lambda: cached.compress([prompt]),  # fills the cache while it warms up
            "parse the text": lambda: encoding.parse_raw(text),
        }
        timings = time_interleaved(jobs, args.repeats)
        stats = cached.compress([prompt])[0].stats
    encoded = timings["encoded"]
    rows = [
        (name, f"{timing.median_s * 1e3:.1f}", f"{median_ratio(encoded, timing):.1f}", f"{timing.spread:.0%}")
        for name, timing in timings.items()
    ]
    figures = {
        "memory_tokens": stats.memory_tokens,
        "cached_tokens": stats.cached_tokens,
        "times_faster": median_ratio(encoded, timings["cached"]),
        "runs_s": runs_of(timings),
        "config": encoding.files.config.to_json(),
    }
    return markdown_table(("job", "ms", "× faster than encoding", "spread"), rows), figures
