"""Generating for prompts of mixed lengths: one by one, in batches as they come, in batches sorted by length.

Beside them stands transformers' own `generate` on the same rows, ready made and padded to batches. Latents are cached
beforehand and every row gets the same number of new tokens, so that the ways differ in nothing but batching. "decoder
rows" counts what went through the decoder, padding included: with the keys and values kept it is the prompts' rows and
one a new token.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from utils.benchmark.material import QUESTION, SEED, cut_into_texts, marked, source_tokens
from utils.benchmark.measure import Timing, finished, machine, markdown_table, median_ratio, time_interleaved
from utils.errors import ConfigError
from utils.flags import add_checkpoint_flags

if TYPE_CHECKING:
    from utils.model.code_llava_model import CodeLLaVAModel
    from utils.model.prompt import MemoryPrompt

DESCRIPTION = "generation for prompts of mixed lengths, batched in several ways"
QUICK = {"prompts": 4, "longest": 256, "new_tokens": 3, "batch_size": 2, "repeats": 1}
Batches = list[list["MemoryPrompt"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's flags."""
    add_checkpoint_flags(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--prompts", type=int, default=8, help="default 8")
    group.add_argument("--shortest", type=int, default=64, help="memory tokens of the shortest; default 64")
    group.add_argument("--longest", type=int, default=2048, help="memory tokens of the longest; default 2048")
    group.add_argument("--new-tokens", type=int, default=16, help="of each prompt; default 16")
    group.add_argument("--batch-size", type=int, default=4, help="default 4")
    group.add_argument("--repeats", type=int, default=3, help="counted rounds; default 3")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure.

    Returns:
        A table for people, and everything as one JSON-ready value.
    """
    from utils.compress.latent_cache import LatentCache
    from utils.inference.generation import batches_by_length
    from utils.inference.inference import load_model

    if min(args.prompts, args.shortest, args.new_tokens, args.batch_size, args.repeats) < 1:
        raise ConfigError("--prompts, --shortest, --new-tokens, --batch-size and --repeats must be at least 1")
    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        model, _, processor = load_model(
            args.checkpoint, args.device, args.chunk_size, None, args.attn_implementation, args.dtype,
            batch_tokens=args.batch_tokens, cache=cache,
        )  # fmt: skip
        prompts = [processor.parse_raw(text) for text in _texts(processor.tokenizers.encoder, args)]
        model.check_room(prompts, args.new_tokens)
        as_they_come = [prompts[at : at + args.batch_size] for at in range(0, len(prompts), args.batch_size)]
        lengths = [len(prompt.input_ids) for prompt in prompts]
        by_length = [[prompts[i] for i in batch] for batch in batches_by_length(lengths, args.batch_size)]
        ways: dict[str, tuple[Batches, Callable[[], Any]]] = {
            "one by one": _ours(model, [[prompt] for prompt in prompts], args.new_tokens),
            "batches as they come": _ours(model, as_they_come, args.new_tokens),
            "batches sorted by length": _ours(model, by_length, args.new_tokens),
            "transformers, padded batches": (as_they_come, _transformers(model, as_they_come, args.new_tokens)),
        }
        jobs = {name: finished(job, model.device) for name, (_, job) in ways.items()}
        timings = time_interleaved(jobs, args.repeats)
        decoder_rows = {name: _count_rows(model, job) for name, (_, job) in ways.items()}
        config = model.config.to_json()
    padding = {name: _padding(batches) for name, (batches, _) in ways.items()}
    return _report(args, timings, padding, decoder_rows, sorted(lengths), config)


def _texts(tokenizer: Any, args: argparse.Namespace) -> list[str]:
    """Prompts whose memories grow by a constant factor, in a fixed random order."""
    growth = (args.longest / args.shortest) ** (1 / max(1, args.prompts - 1))
    lengths = [max(1, round(args.shortest * growth**number)) for number in range(args.prompts)]
    random.Random(SEED).shuffle(lengths)
    tokens = source_tokens(tokenizer, sum(lengths))
    texts, at = [], 0
    for length in lengths:
        texts.append(marked(cut_into_texts(tokenizer, tokens[at : at + length], 1)) + QUESTION)
        at += length
    return texts


def _ours(model: CodeLLaVAModel, batches: Batches, new_tokens: int) -> tuple[Batches, Callable[[], Any]]:
    def job() -> None:
        for batch in batches:
            model.generate(batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens)

    return batches, job


def _transformers(model: CodeLLaVAModel, batches: Batches, new_tokens: int) -> Callable[[], Any]:
    """The decoder's own `generate` on rows that are ready."""
    import torch

    from utils.model.generate import pad_left

    with torch.inference_mode():
        padded = [pad_left(model.embed_prompts(batch)) for batch in batches]

    def job() -> None:
        with torch.inference_mode():
            for embeds, mask in padded:
                model.decoder.generate(
                    inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens, pad_token_id=model.pad_token_id,
                )  # fmt: skip

    return job


def _count_rows(model: CodeLLaVAModel, job: Callable[[], Any]) -> int:
    """Rows that go through the decoder in one run of a job."""
    with _watched(model.decoder.get_decoder()) as shapes:
        job()
    return sum(batch * rows for batch, rows in shapes)


@contextmanager
def _watched(decoder: Any) -> Iterator[list[tuple[int, int]]]:
    """Collect (batch, rows) of every forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None]
        shapes.append((given[0].shape[0], given[0].shape[1]))

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def _padding(batches: Batches) -> float:
    """Share of the prefilled rows that is padding."""
    lengths = [[len(prompt.input_ids) for prompt in batch] for batch in batches]
    padded = sum(max(batch) * len(batch) for batch in lengths)
    return 1 - sum(map(sum, lengths)) / padded


def _report(
    args: argparse.Namespace,
    timings: dict[str, Timing],
    padding: dict[str, float],
    decoder_rows: dict[str, int],
    lengths: Sequence[int],
    config: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    plain = timings["transformers, padded batches"]
    rows = [
        (
            name,
            f"{timing.median_s:.2f}",
            f"{args.prompts * args.new_tokens / timing.median_s:.1f}",
            f"{median_ratio(plain, timing):.2f}",
            f"{padding[name]:.0%}",
            decoder_rows[name],
            f"{timing.spread:.0%}",
        )
        for name, timing in timings.items()
    ]
    header = ("way", "seconds", "new tokens/s", "× transformers", "padding", "decoder rows", "spread")
    result = {
        "benchmark": "generate",
        "prompt_rows": lengths,
        "new_tokens": args.new_tokens,
        "batch_size": args.batch_size,
        "runs_s": {name: timing.runs_s for name, timing in timings.items()},
        "times_transformers": {name: round(median_ratio(plain, timing), 3) for name, timing in timings.items()},
        "padding": {name: round(share, 4) for name, share in padding.items()},
        "decoder_rows": decoder_rows,
        "dtype": args.dtype,
        "config": config,
        "seed": SEED,
        "machine": machine(),
    }
    return markdown_table(header, rows), result
