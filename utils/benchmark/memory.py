"""Peak memory of encoding long memories, each length in a fresh process, beside what its latents alone take.

Micro-batches keep the encoder's activations flat, so that a longer memory should cost its latents and its tokens and
nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.benchmark.material import cut_into_spans, load_settings, source_tokens
from utils.benchmark.measure import machine, markdown_table
from utils.errors import ConfigError
from utils.inference.flags import add_checkpoint_flags

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
    rows = [_in_a_fresh_process(args, tokens) for tokens in args.tokens]
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


def _in_a_fresh_process(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(encode_once, args.checkpoint, load_settings(args), tokens).result()
        except BrokenProcessPool:
            raise ConfigError(
                f"encoding {tokens} tokens ended its process, most likely for lack of memory: lower --tokens"
            ) from None


def encode_once(checkpoint: str | None, settings: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Load a checkpoint and encode one span in this process.

    Returns:
        Bytes held before and at the peak (of the device, where it is a GPU), bytes of the latents, seconds.
    """
    import torch

    from utils.inference.compressor import Compressor

    compressor = Compressor.load(checkpoint, **settings)
    tokens = source_tokens(compressor.processor.tokenizers.encoder, num_tokens)
    spans = cut_into_spans(tokens, 1, compressor.files.config.chunk_size)
    device = compressor.memory_encoder.chunker.device
    on_gpu = device.type == "cuda"
    loaded = torch.cuda.memory_allocated(device) if on_gpu else _status_bytes("VmRSS")
    _forget_peak()
    began = time.perf_counter()
    ((latents, _),) = compressor.encode_spans(spans)
    seconds = time.perf_counter() - began
    return {
        "tokens": num_tokens,
        "loaded_bytes": loaded,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else _status_bytes("VmHWM"),
        "latent_bytes": latents.numel() * latents.element_size(),
        "seconds": round(seconds, 2),
        "config": compressor.files.config.to_json(),
    }


def _status_bytes(name: str) -> int:
    """A figure of this process; unlike getrusage's, it knows nothing of the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError("the memory benchmark reads /proc/self/status: run it on Linux") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _forget_peak() -> None:
    """Let the peak begin here; where the kernel does not allow that, loading counts too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
