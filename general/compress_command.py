"""What `step1.py` and `step1_raw_text.py` share: load, parse, compress, save, report.

The result (file, shape, counts, ratio, seconds) goes to stdout. Nothing is written before everything succeeded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_OK, print_json
from utils.errors import PromptError
from utils.files import refuse_overwriting_inputs
from utils.flags import (
    add_cache_flags,
    add_checkpoint_flags,
    add_memory_limit_flags,
    encoder_settings,
    memory_limit,
    open_cache,
)

if TYPE_CHECKING:
    from utils.compress.compressor import Compressor
    from utils.model.prompt import MemoryPrompt

DEFAULT_OUTPUT = "artifacts/prompt_embeddings.npy"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both commands."""
    add_checkpoint_flags(parser, per_span_chunk_size=True)
    add_memory_limit_flags(parser)
    add_cache_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", default=DEFAULT_OUTPUT, help=f"default {DEFAULT_OUTPUT}, beside it its .json")
    output.add_argument(
        "--format", choices=("npy", "safetensors"), help="npy is float32, safetensors keeps bfloat16; default by name"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object")


def compress_and_save(
    args: argparse.Namespace, parse: Callable[[Compressor], MemoryPrompt], inputs: Mapping[str, Any]
) -> int:
    """Run the command once its prompt is known.

    Args:
        args: Parsed flags.
        parse: Turns the command's prompt into a `MemoryPrompt` with the loaded compressor.
        inputs: Flag → files that the prompt was read from.

    Raises:
        ConfigError: The output, or its sidecar, is one of the inputs or lies in the checkpoint.
    """
    from utils.compress.compressor import Compressor
    from utils.compress.prompt_embeds import save_prompt_embeds, sidecar_path

    outputs = {"--output": args.output, "the sidecar of --output": sidecar_path(args.output)}
    refuse_overwriting_inputs(outputs, inputs)
    sizes = args.chunk_size
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
    prompt = parse(compressor)
    embeds = compressor.compress([prompt])[0]
    compressed = time.perf_counter()
    save_prompt_embeds(args.output, embeds, format=args.format)
    result = {
        "output": str(args.output),
        "checkpoint": str(compressor.files.root),
        "shape": list(embeds.values_TD.shape),
        "spans": len(embeds.spans),
        "memory_tokens": embeds.stats.memory_tokens,
        "num_latents": embeds.stats.num_latents,
        "ratio": round(embeds.stats.ratio, 2),
        "cached_tokens": embeds.stats.cached_tokens,
        "truncated_tokens": sum(span.truncated_tokens for span in prompt.spans),
        "load_seconds": round(loaded - began, 3),
        "compress_seconds": round(compressed - loaded, 3),
    }
    if args.json:
        print_json(result)
    else:
        _print_for_a_person(result)
    return EXIT_OK


def read_text(path: str | Path) -> str:
    """Read a file as UTF-8, every character as it is (line ends included).

    Raises:
        PromptError: The file is not UTF-8 text.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def _print_for_a_person(result: dict[str, Any]) -> None:
    rows, width = result["shape"]
    print(f"prompt embeddings  [{rows}, {width}] in {result['output']}")
    print(
        f"memory             {result['memory_tokens']} tokens in {result['spans']} spans → "
        f"{result['num_latents']} latents, ratio {result['ratio']}"
    )
    if result["cached_tokens"]:
        print(f"from the cache     {result['cached_tokens']} tokens")
    if result["truncated_tokens"]:
        print(f"left out           {result['truncated_tokens']} tokens over --max-memory-tokens")
    print(f"time               load {result['load_seconds']} s, compress {result['compress_seconds']} s")
