"""Time to the first token with latents in place of text, beside the same decoder on the full text.

S = time with the full text / time with latents, both from the prompt as a string to the first token's id, in turns on
one machine. Both ways are the program's own: `parse_raw`, `encode_spans` and `embed` of the compressor, then one
forward pass of the decoder that keeps its keys and values. Two ideals stand beside it:

    by operations   S of `utils.training.flops`: what the counts allow on a machine that does all of them equally fast
    by parts        decoder on the full text / (bare encoder and adapter + decoder on the short prompt), each of them
                    measured alone in the same rounds: what this machine allows; the target is 0.9 of it

For cached latents the encoder's part is nothing. Each length is measured at the checkpoint's chunk size, the first
length at the others, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from utils.benchmark.measure import Timing, markdown_table, synchronize, time_interleaved
from utils.benchmark.sources import (
    QUESTION,
    bare_encoder,
    bare_forward,
    cut_into_texts,
    load_compressor,
    marked,
    source_tokens,
)
from utils.checkpoint.load import load_decoder
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.flags import encoder_settings
from utils.model.limits import check_prompt_fits
from utils.training.flops import PairCost

STAGES = ("tokenise", "encode", "splice", "prefill")
# Tokens of a bare encoder pass: its best batch shape on two cores, and enough for a card.
_BARE_TOKENS = {"cpu": 1024, "cuda": 65536}
Seconds = dict[str, float]


@torch.inference_mode()
def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; tables for people, and the figures.

    Raises:
        PromptError: A full text is longer than the decoder's positions; nothing has been measured then.
    """
    with tempfile.TemporaryDirectory() as folder, LatentCache.open(folder) as cache:
        encoding, cached = load_compressor(args), load_compressor(args, cache)
        pair = _Pair(encoding, load_decoder(encoding.files, encoder_settings(args)))
        texts = {
            tokens: cut_into_texts(pair.encoder_tokenizer, pair.tokens(tokens), args.spans) for tokens in args.tokens
        }
        for tokens, parts in texts.items():
            num_rows = len(pair.tokenise(_full_text(parts)))
            check_prompt_fits(num_rows, pair.decoder.config, 1, f"the full text of {tokens} memory tokens")
        own, cases = encoding.files.config.chunk_size, []
        for tokens, parts in texts.items():
            sizes = [own, *(args.also_chunk_sizes if tokens == args.tokens[0] else [])]
            ways = [(size, way) for size in dict.fromkeys(sizes) for way in (encoding, cached)]
            cases += _measure(pair, tokens, parts, ways, args.repeats)
    tables = f"{_table(cases)}\n\nMilliseconds of each stage (medians):\n\n{_stage_table(cases)}"
    return tables, {"cases": cases, "config": encoding.files.config.to_json()}


class _Pair:
    """A checkpoint's encoder and decoder, and what each does up to the first token."""

    def __init__(self, encoding: Compressor, decoder: Any) -> None:
        self.encoding, self.decoder = encoding, decoder
        self.config = encoding.files.config
        self.encoder_tokenizer = encoding.processor.tokenizers.encoder
        self.device = encoding.memory_encoder.chunker.device
        self._bare = bare_encoder(encoding)

    def tokens(self, count: int) -> list[int]:
        """So many encoder tokens of source text."""
        return source_tokens(self.encoder_tokenizer, count)

    def tokenise(self, text: str) -> list[int]:
        """The decoder's ids of a text."""
        return list(self.encoding.processor.tokenizers.decoder(text)["input_ids"])

    def read_text(self, text: str) -> Seconds:
        """The first token after text, with the seconds of each stage."""
        seconds: Seconds = {}
        with self._stage(seconds, "tokenise"):
            ids = self.tokenise(text)
        with self._stage(seconds, "prefill"):
            self.prefill(input_ids=torch.tensor(ids, device=self.device)[None])
        return seconds

    def read_latents(self, compressor: Compressor, text: str, chunk_size: int) -> Seconds:
        """The first token after a prompt with memory, with the seconds of each stage."""
        seconds: Seconds = {}
        with self._stage(seconds, "tokenise"):
            prompt = compressor.parse_raw(text, chunk_size)
        with self._stage(seconds, "encode"):
            encoded = compressor.encode_spans(prompt.spans)
        with self._stage(seconds, "splice"):
            rows_TD = compressor.embed(prompt, encoded).values_TD
        with self._stage(seconds, "prefill"):
            self.prefill(inputs_embeds=rows_TD.to(self.device)[None])
        return seconds

    def prefill(self, **inputs: torch.Tensor) -> int:
        """The first token's id."""
        logits_11V = self.decoder(**inputs, use_cache=True, logits_to_keep=1).logits
        return int(logits_11V.argmax())

    def encoder_alone(self, num_tokens: int) -> Callable[[], Any]:
        """A job: bare encoder and adapter on as many tokens."""
        adapter = self.encoding.memory_encoder.adapter
        windows = max(1, _BARE_TOKENS.get(self.device.type, 1024) // self.config.window)
        forward = bare_forward(self._bare, self.tokens(num_tokens), self.config.window, windows)
        num_latents = num_tokens // self.config.chunk_size or 1
        pooled_NE = torch.randn(num_latents, adapter.norm.weight.numel(), device=self.device).to(self._bare.dtype)
        return lambda: (forward(), adapter(pooled_NE, [num_latents]))

    def decoder_alone(self, num_rows: int) -> Callable[[], Any]:
        """A job: the decoder on as many rows."""
        rows_1TD = torch.randn(1, num_rows, self.encoding.width, device=self.device).to(self.decoder.dtype)
        return partial(self.prefill, inputs_embeds=rows_1TD)

    @contextmanager
    def _stage(self, seconds: Seconds, name: str) -> Iterator[None]:
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        seconds[name] = time.perf_counter() - began


def _full_text(parts: Sequence[str]) -> str:
    return "\n".join(parts) + QUESTION


def _measure(
    pair: _Pair, tokens: int, parts: Sequence[str], ways: Sequence[tuple[int, Compressor]], repeats: int
) -> list[dict[str, Any]]:
    """One length in one text: as it is and in each way (chunk size, compressor), in the same rounds."""
    text = marked(parts) + QUESTION
    prompts = [pair.encoding.parse_raw(text, size) for size, _ in ways]
    read = [partial(pair.read_text, _full_text(parts)), *(partial(pair.read_latents, way, text, k) for k, way in ways)]
    stages: list[list[Seconds]] = [[] for _ in read]
    jobs: dict[str, Callable[[], Any]] = {
        f"way {number}": partial(lambda job, found: found.append(job()), job, found)
        for number, (job, found) in enumerate(zip(read, stages, strict=True))
    }
    jobs["encoder alone"] = pair.encoder_alone(tokens)
    jobs |= {f"decoder alone, {len(p.input_ids)} rows": pair.decoder_alone(len(p.input_ids)) for p in prompts}
    timings = time_interleaved(jobs, repeats, pair.device)
    full, *others = (runs[1:] for runs in stages)  # without the warm-up
    sizes: dict[str, Any] = {"full_rows": len(pair.tokenise(_full_text(parts)))}
    cost = PairCost.of(pair.encoding.memory_encoder, pair.decoder)
    cases = []
    for (chunk_size, compressor), prompt, runs in zip(ways, prompts, others, strict=True):
        cached = compressor is not pair.encoding
        sizes["prompt_rows"] = len(prompt.input_ids)
        lengths = [len(span.token_ids) for span in prompt.spans]
        ideal = cost.ideal_speedup(**sizes, span_lengths=lengths, chunk_size=chunk_size, cached=cached)
        alone_s = np.array(timings[f"decoder alone, {len(prompt.input_ids)} rows"].runs_s)
        if not cached:
            alone_s += timings["encoder alone"].runs_s
        case = {"tokens": tokens, "chunk_size": chunk_size, "cached": cached, **sizes, "ideal_operations": ideal}
        cases.append(case | _figures(full, runs, alone_s))
    return cases


def _figures(full: list[Seconds], runs: list[Seconds], alone_s: np.ndarray) -> dict[str, Any]:
    """Medians over the rounds of full text beside latents; `alone_s` is what the latents' parts took alone."""
    full_s, runs_s = (np.array([sum(run.values()) for run in some]) for some in (full, runs))
    ideals = np.array([run["prefill"] for run in full]) / alone_s
    return {
        "speedup": float(np.median(full_s / runs_s)),
        "ideal_parts": float(np.median(ideals)),
        "of_ideal_parts": float(np.median(full_s / runs_s / ideals)),
        "full_runs_s": full_s.tolist(),
        "runs_s": runs_s.tolist(),
        "stages_s": {name: statistics.median(run[name] for run in runs) for name in STAGES},
    }


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["tokens"], case["chunk_size"], "cached" if case["cached"] else "encoded"


def _table(cases: Sequence[dict[str, Any]]) -> str:
    header = ("tokens", "chunk", "latents", "rows", "full text ms", "ms", "S")
    ideals = ("ideal S by operations", "by parts", "S / ideal by parts", "spread")
    rows = [
        (
            *_key(case),
            case["prompt_rows"],
            _milliseconds(statistics.median(case["full_runs_s"])),
            _milliseconds(statistics.median(case["runs_s"])),
            *(f"{case[name]:.2f}" for name in ("speedup", "ideal_operations", "ideal_parts", "of_ideal_parts")),
            f"{Timing(runs_s=tuple(case['runs_s'])).spread:.0%}",
        )
        for case in cases
    ]
    return markdown_table((*header, *ideals), rows)


def _stage_table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [(*_key(case), *(_milliseconds(case["stages_s"][name]) for name in STAGES)) for case in cases]
    return markdown_table(("tokens", "chunk", "latents", *STAGES), rows)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
