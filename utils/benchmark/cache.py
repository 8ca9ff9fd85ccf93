"""Prompt → embeddings with the latent cache: text that is known, beside the same text encoded.

The memory is real Python source in one prompt of several files. Parsing the text, which is tokenising and nothing that
a cache of latents could save, is timed on its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from utils.benchmark.encode import source_tokens
from utils.benchmark.measure import Timing, machine, markdown_table, median_ratio, time_interleaved
from utils.errors import ConfigError
from utils.inference.flags import add_checkpoint_flags
from utils.model.markers import MEMORY_END, MEMORY_START

DESCRIPTION = "cached prompts to embeddings, beside encoding them"


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
    from utils.inference.compressor import Compressor
    from utils.inference.latent_cache import LatentCache

    if not 1 <= args.spans <= args.tokens:
        raise ConfigError(f"--spans {args.spans}: expected 1 to {args.tokens}, one token a span at least")
    settings = {
        "chunk_size": args.chunk_size, "device": args.device, "dtype": args.dtype,
        "attn_implementation": args.attn_implementation, "batch_tokens": args.batch_tokens,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        encoding = Compressor.load(args.checkpoint, **settings)
        cached = Compressor.load(args.checkpoint, **settings, cache=cache)
        text = _prompt_text(encoding.processor.tokenizers.encoder, args.tokens, args.spans)
        prompt = encoding.parse_raw(text)
        jobs: dict[str, Callable[[], Any]] = {
            "encoded": lambda: encoding.compress([prompt]),
            "cached": lambda: cached.compress([prompt]),  # fills the cache while it warms up
            "parse the text": lambda: encoding.parse_raw(text),
        }
        timings = time_interleaved(jobs, args.repeats)
        again = cached.compress([prompt])[0].stats
    return _report(args, timings, again.memory_tokens, again.cached_tokens)


def _prompt_text(tokenizer: Any, num_tokens: int, num_spans: int) -> str:
    tokens = source_tokens(tokenizer, num_tokens)
    size = -(-num_tokens // num_spans)
    parts = [tokenizer.decode(tokens[at : at + size]) for at in range(0, num_tokens, size)]
    return "\n".join(f"{MEMORY_START}{part}{MEMORY_END}" for part in parts)


def _report(
    args: argparse.Namespace, timings: dict[str, Timing], memory_tokens: int, cached_tokens: int
) -> tuple[str, dict[str, Any]]:
    encoded = timings["encoded"]
    rows = [
        (name, f"{timing.median_s * 1e3:.1f}", f"{median_ratio(encoded, timing):.1f}", f"{timing.spread:.0%}")
        for name, timing in timings.items()
    ]
    result = {
        "benchmark": "cache",
        "memory_tokens": memory_tokens,
        "cached_tokens": cached_tokens,
        "spans": args.spans,
        "dtype": args.dtype,
        "runs_s": {name: timing.runs_s for name, timing in timings.items()},
        "times_faster": round(median_ratio(encoded, timings["cached"]), 1),
        "machine": machine(),
    }
    return markdown_table(("job", "ms", "× faster than encoding", "spread"), rows), result
