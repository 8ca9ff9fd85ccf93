"""Generating for prompts of mixed lengths: one by one, in batches as they come, in batches sorted by length.

Beside them stands transformers' own `generate` on the same rows, ready made and padded to batches. Latents are cached
beforehand and every row gets the same number of new tokens, so that the ways differ in nothing but batching.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from utils.benchmark.measure import markdown_table, median_ratio, runs_of, time_interleaved
from utils.benchmark.sources import QUESTION, SEED, marked, source_tokens
from utils.compress.latent_cache import LatentCache
from utils.errors import ConfigError
from utils.inference.generation import batches_by_length
from utils.inference.inference import load_model
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.generate import pad_left
from utils.model.prompt import MemoryPrompt

Batches = list[list[MemoryPrompt]]


@torch.inference_mode()
def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures."""
    if min(args.prompts, args.shortest, args.new_tokens, args.batch_size) < 1:
        raise ConfigError("--prompts, --shortest, --new-tokens and --batch-size must be at least 1")
    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        model, _, processor = load_model(
            args.checkpoint, args.device, args.chunk_size, None, args.attn_implementation, args.dtype,
            batch_tokens=args.batch_tokens, cache=cache,
        )  # fmt: skip
        prompts = [processor.parse_raw(text) for text in _texts(processor.tokenizers.encoder, args)]
        model.check_room(prompts, args.new_tokens)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        as_they_come = [prompts[at : at + args.batch_size] for at in range(0, len(prompts), args.batch_size)]
        by_length = [[prompts[i] for i in batch] for batch in batches_by_length(lengths, args.batch_size)]
        batches = {
            "one by one": [[prompt] for prompt in prompts],
            "batches as they come": as_they_come,
            "batches sorted by length": by_length,
            "transformers, padded batches": as_they_come,
        }
        jobs: dict[str, Callable[[], Any]] = {
            name: partial(_ours, model, own, args.new_tokens) for name, own in batches.items()
        }
        padded = [pad_left(model.embed_prompts(batch)) for batch in as_they_come]
        jobs["transformers, padded batches"] = partial(_transformers, model, padded, args.new_tokens)
        timings = time_interleaved(jobs, args.repeats, model.device)
    plain = timings["transformers, padded batches"]
    ratio = {name: median_ratio(plain, timing) for name, timing in timings.items()}
    padding = {name: _padding(own) for name, own in batches.items()}
    speed = {name: args.prompts * args.new_tokens / timing.median_s for name, timing in timings.items()}
    rows = [
        (
            name,
            f"{t.median_s:.2f}",
            f"{speed[name]:.1f}",
            f"{ratio[name]:.2f}",
            f"{padding[name]:.0%}",
            f"{t.spread:.0%}",
        )
        for name, t in timings.items()
    ]
    figures = {
        "prompt_rows": sorted(lengths),
        "new_tokens_per_s": speed,
        "times_transformers": ratio,
        "padding": padding,
        "runs_s": runs_of(timings),
        "config": model.config.to_json(),
    }
    return markdown_table(("way", "seconds", "new tokens/s", "× transformers", "padding", "spread"), rows), figures


def _texts(tokenizer: Any, args: argparse.Namespace) -> list[str]:
    """Prompts whose memories grow by a constant factor, in a fixed random order."""
    growth = (args.longest / args.shortest) ** (1 / max(1, args.prompts - 1))
    lengths = [max(1, round(args.shortest * growth**number)) for number in range(args.prompts)]
    random.Random(SEED).shuffle(lengths)
    tokens = iter(source_tokens(tokenizer, sum(lengths)))
    return [marked([tokenizer.decode([next(tokens) for _ in range(n)])]) + QUESTION for n in lengths]


def _ours(model: CodeLLaVAModel, batches: Batches, new_tokens: int) -> None:
    for batch in batches:
        model.generate(batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens)


def _transformers(model: CodeLLaVAModel, padded: list[tuple[torch.Tensor, torch.Tensor]], new_tokens: int) -> None:
    """The decoder's own `generate` on rows that are ready."""
    for embeds_BTD, mask_BT in padded:
        model.decoder.generate(
            inputs_embeds=embeds_BTD, attention_mask=mask_BT, do_sample=False, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=model.pad_token_id,
        )  # fmt: skip


def _padding(batches: Batches) -> float:
    """Share of the prefilled rows that is padding."""
    lengths = [[len(prompt.input_ids) for prompt in batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(max(batch) * len(batch) for batch in lengths)
