"""What the time-to-first-token benchmark runs: one checkpoint in one dtype, from prompt text to the first token.

Both ways are the program's own: `parse_raw`, `encode_spans` and `embed` of the compressor, then one forward pass of the
decoder that keeps its keys and values, as the first step of a generation does. Shape legend: B prompts, T rows.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from utils.benchmark.material import (
    QUESTION,
    bare_encoder,
    bare_forward,
    cut_into_texts,
    load_compressor,
    marked,
    source_tokens,
)
from utils.benchmark.stages import StageClock, StagedJob
from utils.benchmark.ttft_cases import Case, Group
from utils.checkpoint.load import load_decoder
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.compress.prompt_embeds import encode_wire
from utils.flags import encoder_settings
from utils.model.config import CompressionConfig
from utils.model.generate import pad_left
from utils.model.limits import check_prompt_fits
from utils.model.prompt import MemoryPrompt
from utils.training.flops import PairCost

# Tokens of a bare encoder pass: its best batch shape on two cores.
_BARE_TOKENS = {"cpu": 1024, "cuda": 65536}


class Subject:
    """One checkpoint in one dtype.

    Args:
        args: The benchmark's flags.
        dtype: As the flag names it.
        latents: Cache for the cached way.
        ask: Sends text or rows to a server and waits for one token; None to prefill here.
    """

    def __init__(self, args: argparse.Namespace, dtype: str, latents: LatentCache, ask: Any = None) -> None:
        self.encoding = load_compressor(args, dtype=dtype)
        self.cached = load_compressor(args, dtype=dtype, cache=latents)
        self.device = self.encoding.memory_encoder.chunker.device
        files = self.encoding.files
        self.decoder = load_decoder(files, encoder_settings(args, dtype=dtype))
        self.cost = PairCost.of(self.encoding.memory_encoder, self.decoder)
        self._bare = bare_encoder(self.encoding)
        self._ask = ask
        self._run = 0
        self._known_parts: dict[tuple[int, int, int], list[str]] = {}

    @classmethod
    @contextmanager
    def open(cls, args: argparse.Namespace, dtype: str, latents: LatentCache) -> Iterator[Subject]:
        """Load it, and keep a connection to the server if one is named."""
        if not args.server_url:
            yield cls(args, dtype, latents)
            return
        # Here, not above: a prefill in this process needs no HTTP client.
        from utils.client.server_client import VllmClient

        with asyncio.Runner() as runner:
            client = VllmClient(args.server_url)

            def ask(prompt: Any) -> None:
                runner.run(client.complete(prompt, max_tokens=1, temperature=0))

            try:
                subject = cls(args, dtype, latents, ask)
                runner.run(client.preflight(width=subject.encoding.width))
                yield subject
            finally:
                runner.run(client.close())

    @property
    def config(self) -> CompressionConfig:
        """How the checkpoint compresses."""
        return self.encoding.files.config

    @property
    def has_server(self) -> bool:
        """Whether the prefill happens elsewhere."""
        return self._ask is not None

    def check_room(self, groups: Sequence[Group]) -> None:
        """Raise `PromptError` before anything is measured if a full text is longer than the decoder's positions."""
        for group in groups:
            check_prompt_fits(
                self._num_full_rows(group), self.decoder.config, 1, f"the full text of {group.tokens} memory tokens"
            )

    def jobs(self, group: Group) -> dict[str, StagedJob]:
        """The ways to a first token, and their parts alone."""
        runs: dict[str, Any] = {"full text": lambda clock: self._full_text(clock, group)}
        for case in group.cases:
            for cached in (False, True):
                runs[self.job_name(case, cached)] = self._compressed(case, cached)
        tokens = source_tokens(self.encoding.processor.tokenizers.encoder, group.tokens * group.batch)
        forward = bare_forward(self._bare, tokens, self.config.window, self._bare_windows)
        adapter = self.encoding.memory_encoder.adapter
        latents = [len(tokens) // self.config.chunk_size or 1]
        pooled_NE = torch.randn(latents[0], adapter.norm.weight.numel(), device=self.device).to(self._bare.dtype)
        runs["encoder alone"] = lambda clock: (forward(), adapter(pooled_NE, latents))
        for case in group.cases:
            rows = self.facts(group, case)["prompt_rows"]
            runs[f"decoder alone, {rows} rows"] = partial(self._decoder_alone, group.batch, rows)
        return {name: StagedJob(torch.inference_mode()(run), self.device) for name, run in runs.items()}

    def facts(self, group: Group, case: Case) -> dict[str, Any]:
        """A case in numbers: rows, tokens, and the ideal speed-ups by operations."""
        prompt = self.encoding.parse_raw(self._fresh(self._texts(case))[0], case.chunk_size)
        sizes: dict[str, Any] = {
            "full_rows": self._num_full_rows(group),
            "prompt_rows": len(prompt.input_ids),
            "span_lengths": [len(span.token_ids) for span in prompt.spans],
            "chunk_size": case.chunk_size,
        }
        return {
            "tokens": case.tokens,
            "memory_tokens": prompt.memory_tokens,
            "chunk_size": case.chunk_size or self.config.chunk_size,
            "spans": case.spans,
            "dtype": case.dtype,
            "batch": case.batch,
            "full_rows": sizes["full_rows"],
            "prompt_rows": sizes["prompt_rows"],
            "ideal": self.cost.ideal_speedup(**sizes),
            "ideal_cached": self.cost.ideal_speedup(**sizes, cached=True),
            "wire_bytes": self.cost.wire_bytes(len(prompt.input_ids)),
        }

    @staticmethod
    def job_name(case: Case, cached: bool) -> str:
        """Name of the compressed way in `jobs`."""
        return f"chunk size {case.chunk_size}, {case.spans} spans, {'cached' if cached else 'encoded'}"

    def _full_text(self, clock: StageClock, group: Group) -> None:
        tokenizer = self.encoding.processor.tokenizers.decoder
        texts = self._fresh(self._full_texts(group))
        if self.has_server:
            # It tokenises by itself.
            with clock.stage("prefill"):
                self._ask_all(texts)
            return
        with clock.stage("tokenise"):
            ids = [tokenizer(text)["input_ids"] for text in texts]
        with clock.stage("prefill"):
            longest = max(map(len, ids))
            padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.device)
            self._first_tokens(_left_mask([len(row) for row in ids], self.device), input_ids=padded)

    def _compressed(self, case: Case, cached: bool) -> Any:
        compressor = self.cached if cached else self.encoding

        def job(clock: StageClock) -> None:
            texts = self._fresh(self._texts(case))
            with clock.stage("tokenise"):
                prompts = [compressor.parse_raw(text, case.chunk_size) for text in texts]
            with clock.stage("encode"), clock.watching(compressor.memory_encoder.adapter, "project"):
                encoded = iter(compressor.encode_spans([span for prompt in prompts for span in prompt.spans]))
            with clock.stage("splice"):
                rows = [self._embed(compressor, prompt, encoded) for prompt in prompts]
            with clock.stage("serialise"):
                sizes = [len(encode_wire(values_TD)) for values_TD in rows]
            assert min(sizes) > 0
            with clock.stage("prefill"):
                if self.has_server:
                    self._ask_all(rows)
                else:
                    embeds_BTD, _ = pad_left(rows)
                    mask = _left_mask([len(row) for row in rows], self.device)
                    self._first_tokens(mask, inputs_embeds=embeds_BTD.to(self.device))
            if self.has_server:
                # The client serialised the rows once more.
                clock.seconds["prefill"] -= clock.seconds["serialise"]

        return job

    def _decoder_alone(self, batch: int, num_rows: int, clock: StageClock) -> None:
        embeds_BTD = torch.randn(batch, num_rows, self.encoding.width, device=self.device).to(self.decoder.dtype)
        if self.has_server:
            self._ask_all([*embeds_BTD])
        else:
            self._first_tokens(inputs_embeds=embeds_BTD)

    def _embed(self, compressor: Compressor, prompt: MemoryPrompt, encoded: Iterator[Any]) -> torch.Tensor:
        return compressor.embed(prompt, [next(encoded) for _ in prompt.spans]).values_TD

    def _first_tokens(self, mask_BT: torch.Tensor | None = None, **inputs: torch.Tensor) -> list[int]:
        logits_B1V = self.decoder(**inputs, attention_mask=mask_BT, use_cache=True, logits_to_keep=1).logits
        return logits_B1V[:, -1].argmax(dim=-1).tolist()

    def _ask_all(self, prompts: Sequence[Any]) -> None:
        assert self._ask is not None
        for prompt in prompts:
            self._ask(prompt)

    def _fresh(self, texts: Sequence[str]) -> list[str]:
        """The texts behind a line that no earlier run had, so that no server finds them in its prefix cache."""
        self._run += 1
        return [f"{self._run:06d}\n{text}" for text in texts]

    def _texts(self, case: Case) -> list[str]:
        return [marked(self._parts(case.tokens, case.spans, n)) + QUESTION for n in range(case.batch)]

    def _full_texts(self, group: Group) -> list[str]:
        return ["\n".join(self._parts(group.tokens, 1, n)) + QUESTION for n in range(group.batch)]

    def _num_full_rows(self, group: Group) -> int:
        text = self._fresh(self._full_texts(group))[0]
        return len(self.encoding.processor.tokenizers.decoder(text)["input_ids"])

    def _parts(self, tokens: int, spans: int, number: int) -> list[str]:
        """The memory of the prompt with this number in a batch: no two prompts of a batch share text."""
        key = (tokens, spans, number)
        if key not in self._known_parts:
            tokenizer = self.encoding.processor.tokenizers.encoder
            mine = source_tokens(tokenizer, tokens * (number + 1))[tokens * number :]
            self._known_parts[key] = cut_into_texts(tokenizer, mine, spans)
        return self._known_parts[key]

    @property
    def _bare_windows(self) -> int:
        return max(1, _BARE_TOKENS.get(self.device.type, 1024) // self.config.window)


def _left_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """The mask of a left-padded batch; None where nothing is padded."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    places = torch.arange(longest, device=device)
    return (places >= longest - torch.tensor(lengths, device=device)[:, None]).long()
