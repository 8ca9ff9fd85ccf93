"""What `step1.py` and `step1_raw_text.py` share: load, parse, compress, save, report.

The result (file, shape, counts, ratio, seconds) goes to stdout. Nothing is written before everything succeeded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from utils.cli import EXIT_OK, describe_rows, print_json
from utils.files import refuse_overwriting_inputs
from utils.flags import (
    add_cache_flags,
    add_checkpoint_flags,
    add_expand_flags,
    add_memory_limit_flags,
    encoder_settings,
    expansion,
    memory_limit,
    open_cache,
)
from utils.model.markers import wrap

_CODE = """\
class RunningMean:
    def __init__(self):
        self.count = 0
        self.mean = 0.0

    def add(self, value):
        self.count += 1
        self.mean += (value - self.mean) / self.count
"""
# The prompt of both commands where none is given.
EXAMPLE = f"What does this class do?\n{wrap(_CODE)}"
DEFAULT_OUTPUT = "artifacts/prompt_embeddings.npy"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both commands."""
    add_checkpoint_flags(parser, per_span_chunk_size=True)
    add_memory_limit_flags(parser)
    add_expand_flags(parser)
    add_cache_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", default=DEFAULT_OUTPUT, help=f"default {DEFAULT_OUTPUT}, beside it its .json")
    output.add_argument(
        "--format", choices=("npy", "safetensors"), help="npy is float32, safetensors keeps bfloat16; default by name"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object")


def compress_and_save(
    args: argparse.Namespace, prompt: str | Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]
) -> int:
    """Compress a prompt into the file that `--output` names, and print what became of it.

    Args:
        args: Parsed flags.
        prompt: A text, taken as it is, or the messages of a chat, for the decoder's template.
        inputs: Flag → files that the prompt was read from.

    Raises:
        ConfigError: The output, or its sidecar, is one of the inputs or lies in the checkpoint.
    """
    # Late for a fast --help: this imports torch.
    from utils.compress.compressor import Compressor
    from utils.compress.prompt_embeds import save_prompt_embeds, sidecar_path

    outputs = {"--output": args.output, "the sidecar of --output": sidecar_path(args.output)}
    refuse_overwriting_inputs(outputs, inputs)
    sizes, stays_text = args.chunk_size, expansion(args)
    began = time.perf_counter()
    compressor = Compressor.load(
        args.checkpoint,
        chunk_size=sizes[0] if sizes else None,
        settings=encoder_settings(args),
        limit=memory_limit(args),
        cache=open_cache(args),
    )
    refuse_overwriting_inputs(outputs, {"--checkpoint": compressor.files.root})
    loaded = time.perf_counter()
    parsed = compressor.parse_raw(prompt, sizes) if isinstance(prompt, str) else compressor.parse_chat(prompt, sizes)
    embeds = compressor.compress([parsed], stays_text)[0]
    compressed = time.perf_counter()
    save_prompt_embeds(args.output, embeds, format=args.format)
    _print_result(
        {
            "output": str(args.output),
            "checkpoint": str(compressor.files.root),
            "shape": list(embeds.values_TD.shape),
            "spans": len(embeds.spans),
            "memory_tokens": embeds.stats.memory_tokens,
            "num_latents": embeds.stats.num_latents,
            "text_rows": embeds.stats.text_rows,
            "ratio": round(embeds.stats.ratio, 2),
            "cached_tokens": embeds.stats.cached_tokens,
            "truncated_tokens": sum(span.truncated_tokens for span in parsed.spans),
            "load_seconds": round(loaded - began, 3),
            "compress_seconds": round(compressed - loaded, 3),
        },
        args.json,
    )
    return EXIT_OK


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    rows, width = result["shape"]
    print(f"prompt embeddings  [{rows}, {width}] in {result['output']}")
    print(f"memory             {result['memory_tokens']} tokens in {result['spans']} spans → {describe_rows(result)}")
    if result["cached_tokens"]:
        print(f"from the cache     {result['cached_tokens']} tokens")
    if result["truncated_tokens"]:
        print(f"left out           {result['truncated_tokens']} tokens over --max-memory-tokens")
    print(f"time               load {result['load_seconds']} s, compress {result['compress_seconds']} s")
