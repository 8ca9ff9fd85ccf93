"""Peak memory of encoding long memories, each length in a fresh process, beside what its latents alone take.

Micro-batches keep the encoder's activations flat, so that a longer memory should cost its latents and its tokens and
nothing else.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from utils.benchmark.material import cut_into_spans, source_tokens
from utils.benchmark.measure import machine, markdown_table
from utils.benchmark.processes import forget_peak, held_bytes, in_a_fresh_process, peak_bytes
from utils.checkpoint.settings import EncoderSettings
from utils.flags import add_checkpoint_flags, encoder_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DESCRIPTION = "peak memory of encoding long memories"
QUICK = {"tokens": [512, 1024]}
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--tokens", type=int, nargs="+", default=[16384, 65536, 262144],
        help="memory tokens, the first is what the others are compared with; default 16384 65536 262144",
    )  # fmt: skip


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        A table for people, and everything as one JSON-ready value.
    """
    settings = encoder_settings(args)
    rows = [in_a_fresh_process(encode_once, args.checkpoint, args.chunk_size, settings, n) for n in args.tokens]
    first = rows[0]["peak_bytes"]
    for row in rows:
        row["ratio"] = round(row["peak_bytes"] / first, 3)
    cells = [
        (
            row["tokens"],
            f"{row['loaded_bytes'] / _MIB:.0f}",
            f"{row['peak_bytes'] / _MIB:.0f}",
            f"{(row['peak_bytes'] - row['loaded_bytes']) / _MIB:.1f}",
            f"{row['latent_bytes'] / _MIB:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    header = ("tokens", "before MiB", "peak MiB", "encoding MiB", "latents MiB", f"× peak at {args.tokens[0]}", "s")
    result = {
        "benchmark": "memory",
        "rows": rows,
        "dtype": args.dtype,
        "config": rows[0].pop("config"),
        "machine": machine(),
    }
    for row in rows[1:]:
        del row["config"]
    return markdown_table(header, cells), result


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Peak memory against length."""
    from utils.benchmark.figures import memory_by_length

    return {"memory_by_length": memory_by_length(result["rows"])}


def encode_once(
    checkpoint: str | None, chunk_size: int | None, settings: EncoderSettings, num_tokens: int
) -> dict[str, Any]:
    """Load a checkpoint and encode one span in this process.

    Returns:
        Bytes held before and at the peak (of the device, where it is a GPU), bytes of the latents, seconds.
    """
    from utils.compress.compressor import Compressor

    compressor = Compressor.load(checkpoint, chunk_size=chunk_size, settings=settings)
    tokens = source_tokens(compressor.processor.tokenizers.encoder, num_tokens)
    spans = cut_into_spans(tokens, 1, compressor.files.config.chunk_size)
    device = compressor.memory_encoder.chunker.device
    loaded = held_bytes(device)
    forget_peak()
    began = time.perf_counter()
    ((latents, _),) = compressor.encode_spans(spans)
    seconds = time.perf_counter() - began
    return {
        "tokens": num_tokens,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(device),
        "latent_bytes": latents.numel() * latents.element_size(),
        "seconds": round(seconds, 2),
        "config": compressor.files.config.to_json(),
    }
