"""What the benchmarks run on: source text, spans of mixed lengths, and the encoder as transformers runs it."""

from __future__ import annotations

import argparse
import itertools
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.errors import ConfigError
from utils.flags import encoder_settings
from utils.model.markers import wrap
from utils.model.prompt import MemorySpan, num_latents
from utils.pretrained import read_model

SEED = 0
QUESTION = "\nWhat does this code do?"


def load_compressor(args: argparse.Namespace, cache: LatentCache | None = None) -> Compressor:
    """Load what the checkpoint flags describe."""
    return Compressor.load(args.checkpoint, chunk_size=args.chunk_size, settings=encoder_settings(args), cache=cache)


def source_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first `count` tokens of this Python's standard library, in the order of its file names.

    Raises:
        ConfigError: The standard library has fewer.
    """
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= count:
            return tokens[:count]
    raise ConfigError(f"--tokens {count}: the standard library's sources here have only {len(tokens)} tokens")


def cut_points(total: int, count: int) -> list[tuple[int, int]]:
    """Cut `total` tokens at random places (a fixed seed) into `count` stretches; none is empty."""
    if not 1 <= count <= total:
        raise ConfigError(f"--spans {count}: expected 1 to {total}, one token a span at least")
    inner = sorted(random.Random(SEED).sample(range(1, total), count - 1))
    return list(itertools.pairwise([0, *inner, total]))


def cut_into_spans(tokens: Sequence[int], count: int, chunk_size: int) -> list[MemorySpan]:
    """Cut tokens into memory spans of mixed lengths."""
    return [
        MemorySpan(text="", token_ids=tokens[a:b], start=0, stop=num_latents(b - a, chunk_size), chunk_size=chunk_size)
        for a, b in cut_points(len(tokens), count)
    ]


def cut_into_texts(tokenizer: Any, tokens: Sequence[int], count: int) -> list[str]:
    """Cut tokens into texts of mixed lengths; a character that is cut through becomes a replacement character."""
    return [tokenizer.decode(tokens[a:b]) for a, b in cut_points(len(tokens), count)]


def marked(texts: Sequence[str]) -> str:
    """One prompt with each text as a memory span."""
    return "\n".join(wrap(text) for text in texts)


def bare_encoder(compressor: Compressor) -> Any:
    """The encoder as transformers loads and runs it, in the dtype and on the device of ours."""
    ours = compressor.memory_encoder.chunker.encoder
    return read_model(AutoModel, compressor.files.encoder, dtype=ours.dtype)[0].to(ours.device).eval()


def bare_forward(encoder: Any, tokens: Sequence[int], window: int, batch: int) -> Callable[[], Any]:
    """A job: full windows in batches through a bare encoder; the last, short one on its own."""
    full = len(tokens) // window * window
    rows = list(torch.tensor(tokens[:full], device=encoder.device).view(-1, window).split(batch)) if full else []
    if full < len(tokens):
        rows.append(torch.tensor(tokens[full:], device=encoder.device)[None])
    return lambda: [encoder(input_ids=ids, use_cache=False) for ids in rows]
