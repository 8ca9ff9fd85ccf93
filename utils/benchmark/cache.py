"""Prompt → embeddings with the latent cache: text that is known, beside the same text encoded.

The memory is real Python source in one prompt of several files. Parsing the text, which is tokenising and nothing that
a cache of latents could save, is timed on its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from utils.benchmark.material import SEED, cut_into_texts, load_compressor, marked, source_tokens
from utils.benchmark.measure import Timing, machine, markdown_table, median_ratio, time_interleaved
from utils.flags import add_checkpoint_flags

if TYPE_CHECKING:
    from utils.compress.prompt_embeds import CompressionStats

DESCRIPTION = "cached prompts to embeddings, beside encoding them"
QUICK = {"tokens": 1024, "spans": 3, "repeats": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--tokens", type=int, default=16384, help="memory tokens; default 16384")
    group.add_argument("--spans", type=int, default=8, help="files in the prompt; default 8")
    group.add_argument("--repeats", type=int, default=3, help="counted rounds; default 3")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        A table for people, and everything as one JSON-ready value.
    """
    from utils.compress.latent_cache import LatentCache

    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        encoding = load_compressor(args)
        cached = load_compressor(args, cache=cache)
        tokenizer = encoding.processor.tokenizers.encoder
        text = marked(cut_into_texts(tokenizer, source_tokens(tokenizer, args.tokens), args.spans))
        prompt = encoding.parse_raw(text)
        jobs: dict[str, Callable[[], Any]] = {
            "encoded": lambda: encoding.compress([prompt]),
            "cached": lambda: cached.compress([prompt]),  # fills the cache while it warms up
            "parse the text": lambda: encoding.parse_raw(text),
        }
        timings = time_interleaved(jobs, args.repeats)
        again = cached.compress([prompt])[0].stats
    return _report(args, timings, again, encoding.files.config.to_json())


def _report(
    args: argparse.Namespace, timings: dict[str, Timing], stats: CompressionStats, config: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    encoded = timings["encoded"]
    rows = [
        (name, f"{timing.median_s * 1e3:.1f}", f"{median_ratio(encoded, timing):.1f}", f"{timing.spread:.0%}")
        for name, timing in timings.items()
    ]
    result = {
        "benchmark": "cache",
        "memory_tokens": stats.memory_tokens,
        "cached_tokens": stats.cached_tokens,
        "spans": args.spans,
        "dtype": args.dtype,
        "config": config,
        "seed": SEED,
        "runs_s": {name: timing.runs_s for name, timing in timings.items()},
        "times_faster": round(median_ratio(encoded, timings["cached"]), 1),
        "machine": machine(),
    }
    return markdown_table(("job", "ms", "× faster than encoding", "spread"), rows), result
