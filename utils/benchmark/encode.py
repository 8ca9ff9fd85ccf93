"""Encoding speed beside its limit: the bare encoder forward of as many tokens at its best batch shape.

The memory is real Python source, cut into 1, 20, 200 and 2000 spans of mixed lengths: the mix should cost nothing.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from utils.benchmark.measure import Timing, machine, markdown_table, median_ratio, time_interleaved
from utils.errors import ConfigError
from utils.inference.flags import add_checkpoint_flags

DESCRIPTION = "encoder throughput for mixed spans, beside the bare encoder forward"
_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--tokens", type=int, default=16384, help="memory tokens; default 16384")
    group.add_argument("--spans", type=int, nargs="+", default=[1, 20, 200, 2000], help="default 1 20 200 2000")
    group.add_argument("--bare-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="windows a bare forward")
    group.add_argument("--repeats", type=int, default=5, help="counted rounds; default 5")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        A table for people, and everything as one JSON-ready value.
    """
    import torch

    from utils.inference.compressor import Compressor

    compressor = Compressor.load(
        args.checkpoint,
        chunk_size=args.chunk_size,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        batch_tokens=args.batch_tokens,
    )
    encoder = compressor.memory_encoder
    config = compressor.files.config
    tokens = source_tokens(compressor.processor.tokenizers.encoder, args.tokens)
    with torch.inference_mode():
        jobs: dict[str, Callable[[], Any]] = {
            f"bare forward, {batch} windows": _bare_forward(compressor, tokens, batch) for batch in args.bare_batches
        }
        for count in args.spans:
            spans = cut_into_spans(tokens, count, config.chunk_size)
            jobs[f"{count} spans"] = _wait(partial(encoder, spans))
        timings = time_interleaved(jobs, args.repeats)
    return _report(args, timings, config.to_json())


def source_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first `count` tokens of this Python's standard library, in the order of its file names.

    Raises:
        ConfigError: The standard library has fewer.
    """
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tokens += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        if len(tokens) >= count:
            return tokens[:count]
    raise ConfigError(f"--tokens {count}: the standard library's sources here have only {len(tokens)} tokens")


def cut_into_spans(tokens: Sequence[int], count: int, chunk_size: int) -> list[Any]:
    """Cut tokens at random places (a fixed seed) into spans; none is empty."""
    from utils.model.prompt import MemorySpan, num_latents

    if not 1 <= count <= len(tokens):
        raise ConfigError(f"--spans {count}: expected 1 to {len(tokens)}, one token a span at least")
    inner = sorted(random.Random(_SEED).sample(range(1, len(tokens)), count - 1))
    edges = [0, *inner, len(tokens)]
    return [
        MemorySpan(text="", token_ids=tokens[a:b], start=0, stop=num_latents(b - a, chunk_size), chunk_size=chunk_size)
        for a, b in itertools.pairwise(edges)
    ]


def _bare_forward(compressor: Any, tokens: Sequence[int], batch: int) -> Callable[[], Any]:
    """The encoder alone, as transformers runs it, on full windows; the last, short one on its own."""
    import torch
    from transformers import AutoModel

    ours = compressor.memory_encoder.chunker.encoder
    bare = AutoModel.from_pretrained(compressor.files.encoder, dtype=ours.dtype).to(ours.device).eval()
    window = compressor.files.config.window
    full = len(tokens) // window * window
    rows = list(torch.tensor(tokens[:full], device=ours.device).view(-1, window).split(batch))
    if full < len(tokens):
        rows.append(torch.tensor(tokens[full:], device=ours.device)[None])
    return _wait(lambda: [bare(input_ids=ids, use_cache=False) for ids in rows])


def _wait(job: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    if not torch.cuda.is_available():
        return job

    def waited() -> None:
        job()
        torch.cuda.synchronize()

    return waited


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
        "config": config,
        "seed": _SEED,
        "runs_s": {name: timing.runs_s for name, timing in timings.items()},
        "ratio_to_bare": {name: round(median_ratio(bare, timing), 4) for name, timing in timings.items()},
        "machine": machine(),
    }
    return table, result
