"""Peak memory of encoding long memories, each length in a fresh process, beside what its latents alone take.

Micro-batches keep the encoder's activations flat, so that a longer memory should cost its latents and its tokens and
nothing else.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from utils.benchmark.measure import MIB, forget_peak, held_bytes, in_a_fresh_process, markdown_table, peak_bytes
from utils.benchmark.sources import cut_into_spans, load_compressor, source_tokens


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    rows = [in_a_fresh_process(encode_once, args, num_tokens) for num_tokens in args.tokens]
    for row in rows:
        row["ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    cells = [
        (
            row["tokens"],
            f"{row['loaded_bytes'] / MIB:.0f}",
            f"{row['peak_bytes'] / MIB:.0f}",
            f"{(row['peak_bytes'] - row['loaded_bytes']) / MIB:.1f}",
            f"{row['latent_bytes'] / MIB:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    header = ("tokens", "before MiB", "peak MiB", "encoding MiB", "latents MiB", f"× peak at {args.tokens[0]}", "s")
    return markdown_table(header, cells), {"rows": rows}


def encode_once(args: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    """Load a checkpoint and encode one span in this process.

    Returns:
        Bytes held before and at the peak (of the device, where it is a GPU), bytes of the latents, seconds.
    """
    compressor = load_compressor(args)
    config, device = compressor.files.config, compressor.memory_encoder.chunker.device
    tokens = source_tokens(compressor.processor.tokenizers.encoder, num_tokens)
    spans = cut_into_spans(tokens, 1, config.chunk_size)
    loaded = held_bytes(device)
    forget_peak()
    began = time.perf_counter()
    ((latents, _),) = compressor.encode_spans(spans)
    return {
        "tokens": num_tokens,
        "seconds": time.perf_counter() - began,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(device),
        "latent_bytes": latents.numel() * latents.element_size(),
    }
