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

import torch

from utils.benchmark.measure import Timing, markdown_table, median_ratio, synchronize, time_interleaved
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
    jobs: dict[Any, Callable[[], Any]] = {
        number: partial(lambda job, found: found.append(job()), job, found)
        for number, (job, found) in enumerate(zip(read, stages, strict=True))
    }
    jobs["encoder alone"] = pair.encoder_alone(tokens)
    jobs |= {("decoder alone", len(p.input_ids)): pair.decoder_alone(len(p.input_ids)) for p in prompts}
    timings = time_interleaved(jobs, repeats, pair.device)
    full, *others = (runs[1:] for runs in stages)  # without the warm-up
    full_s = Timing(runs_s=tuple(sum(run.values()) for run in full))
    full_rows = len(pair.tokenise(_full_text(parts)))
    cost = PairCost.of(pair.encoding.memory_encoder, pair.decoder)
    cases = []
    for (size, compressor), prompt, runs in zip(ways, prompts, others, strict=True):
        is_cached = compressor is not pair.encoding
        ours = Timing(runs_s=tuple(sum(run.values()) for run in runs))
        num_rows = len(prompt.input_ids)
        decoder_s = timings["decoder alone", num_rows].runs_s
        encoder_s = [0.0] * repeats if is_cached else timings["encoder alone"].runs_s
        ideal = Timing(runs_s=tuple(a + b for a, b in zip(encoder_s, decoder_s, strict=True)))
        prefill = Timing(runs_s=tuple(run["prefill"] for run in full))
        cases.append(
            {
                "tokens": tokens,
                "chunk_size": size,
                "cached": is_cached,
                "memory_tokens": prompt.memory_tokens,
                "full_rows": full_rows,
                "prompt_rows": num_rows,
                "speedup": median_ratio(full_s, ours),
                "ideal_operations": cost.ideal_speedup(
                    full_rows=full_rows,
                    prompt_rows=num_rows,
                    span_lengths=[len(span.token_ids) for span in prompt.spans],
                    chunk_size=size,
                    cached=is_cached,
                ),
                "ideal_parts": median_ratio(prefill, ideal),
                "of_ideal_parts": statistics.median(
                    full_s.runs_s[i] / ours.runs_s[i] * ideal.runs_s[i] / prefill.runs_s[i] for i in range(repeats)
                ),
                "spread": ours.spread,
                "full_runs_s": full_s.runs_s,
                "runs_s": ours.runs_s,
                "stages_s": {name: statistics.median(run[name] for run in runs) for name in STAGES},
            }
        )
    return cases


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
            f"{case['spread']:.0%}",
        )
        for case in cases
    ]
    return markdown_table((*header, *ideals), rows)


def _stage_table(cases: Sequence[dict[str, Any]]) -> str:
    rows = [(*_key(case), *(_milliseconds(case["stages_s"][name]) for name in STAGES)) for case in cases]
    return markdown_table(("tokens", "chunk", "latents", *STAGES), rows)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
