"""The model: a memory encoder (chunker and adapter) in front of any causal language model.

    memory spans ──► MemoryEncoder ──► latents ──► CodeLLaVAModel.embed_prompt ──► prompt embeddings ──► decoder

`MemoryEncoder` stands alone, so that compressing never needs the decoder. Shape legend: B prompts, T rows, n latents of
a span, D decoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.errors import ConfigError
from utils.model.adapter import Adapter
from utils.model.code_chunker import CodeChunker
from utils.model.config import CompressionConfig
from utils.model.generate import continue_rows
from utils.model.limits import check_prompt_fits, explain_out_of_memory
from utils.model.prompt import MemoryPrompt, MemorySpan
from utils.model.splice import splice_spans
from utils.model.transfer import to_device
from utils.model.windows import Window, plan_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUnit:
    """The smallest stretch of a span whose latents depend on nothing else: what is batched and cached.

    One window; or, where the adapter attends over a span, all its windows.
    """

    windows: tuple[Window, ...]

    @property
    def num_latents(self) -> int:
        """Latents that this unit gives."""
        return sum(window.num_latents for window in self.windows)

    @property
    def num_tokens(self) -> int:
        """Memory tokens that it stands for."""
        return sum(len(window.core) for window in self.windows)


class MemoryEncoder(nn.Module):
    """Encoder tokens to latents: chunker, then adapter."""

    def __init__(self, chunker: CodeChunker, adapter: Adapter) -> None:
        super().__init__()
        self.chunker = chunker
        self.adapter = adapter

    @property
    def config(self) -> CompressionConfig:
        """How this encoder compresses."""
        return self.chunker.config

    def add_token_columns(self) -> None:
        """Let the adapter read the tokens' own embeddings as well, in place; the latents stay as they are until it
        learns to use them.

        Raises:
            ConfigError: Its pooling or adapter has no place for them.
        """
        self.chunker.config = dataclasses.replace(self.config, token_columns=True)
        self.adapter.add_token_columns(self.chunker.token_width)

    def units(self, span: MemorySpan) -> list[MemoryUnit]:
        """Cut a span into its independent units, in order."""
        config = self.config.with_chunk_size(span.chunk_size)
        windows = plan_windows(span.token_ids, config)
        if self.adapter.has_attention:
            return [MemoryUnit(windows=tuple(windows))]
        return [MemoryUnit(windows=(window,)) for window in windows]

    def encode_units(self, units: Sequence[MemoryUnit], *, to_cpu: bool = False) -> torch.Tensor:
        """Latents of units [n, D] one below the other, whatever spans and prompts the units come from.

        Args:
            units: What to encode; at least one.
            to_cpu: Bring the latents to the CPU, each micro-batch while a CUDA device already works on the next.
        """
        counts = [unit.num_latents for unit in units]
        parts: list[torch.Tensor] = []
        for indices, latents in self._encode_batches(units):
            if not parts:
                # One tensor for all from the start: parts that are joined at the end would be held twice.
                whole = _room_for(sum(counts), latents, to_cpu)
                parts = list(whole.split(counts))
            for i, part in zip(indices, latents.split([counts[i] for i in indices]), strict=True):
                if part.requires_grad:
                    parts[i] = part
                else:
                    parts[i].copy_(part, non_blocking=True)
        if to_cpu and self.chunker.device.type == "cuda":
            torch.cuda.synchronize(self.chunker.device)
        return torch.cat(parts) if parts[0].requires_grad else whole

    def forward(self, spans: Sequence[MemorySpan]) -> list[torch.Tensor]:
        """Latents of each span, [n, D], in the encoder's dtype and on its device."""
        if not spans:
            return []
        units_of_spans = [self.units(span) for span in spans]
        latents = self.encode_units([unit for units in units_of_spans for unit in units])
        return list(latents.split([sum(unit.num_latents for unit in units) for units in units_of_spans]))

    def at_several_sizes(self, groups: Sequence[Sequence[MemorySpan]]) -> list[list[torch.Tensor]]:
        """Latents of spans that differ in their chunk sizes only: the encoder runs once for each group of them.

        Args:
            groups: Spans of equal tokens and different chunk sizes.

        Returns:
            For each span of each group what `forward` gives, up to rounding: [n, D].

        Raises:
            ConfigError: As `check_several_sizes`.
        """
        self.check_several_sizes()
        windows_of_groups = []
        for group in groups:
            configs = [self.config.with_chunk_size(span.chunk_size) for span in group]
            also = tuple(config.chunk_size for config in configs[1:])
            planned = plan_windows(group[0].token_ids, configs[0])
            windows_of_groups.append([dataclasses.replace(window, also=also) for window in planned])
        windows = [window for planned in windows_of_groups for window in planned]
        latents = self.encode_units([MemoryUnit(windows=(window,)) for window in windows])
        parts = iter(latents.split([count for window in windows for count in window.latents_by_size]))
        found = []
        for group, planned in zip(groups, windows_of_groups, strict=True):
            by_window = [[next(parts) for _ in group] for _ in planned]
            found.append([torch.cat(of_size) for of_size in zip(*by_window, strict=True)])
        return found

    def check_several_sizes(self) -> None:
        """Raise `ConfigError` unless hidden states do not depend on the chunk size at which they are pooled."""
        reason = ""
        if self.chunker.pooling.reads_marks:
            reason = f"{self.config.pooling} pooling puts a marker for each chunk into the window"
        elif self.config.window_follows:
            reason = "a window is one chunk, whatever its size"
        elif self.adapter.has_attention:
            reason = f"the {self.adapter.kind} adapter attends over the latents of a span"
        if reason:
            raise ConfigError(f"this pair cannot be pooled at several chunk sizes from one encoding: {reason}")

    def _encode_batches(self, units: Sequence[MemoryUnit]) -> Iterator[tuple[list[int], torch.Tensor]]:
        windows = [window for unit in units for window in unit.windows]
        doing = f"encoding {len(windows)} windows, {self.chunker.batch_tokens or 'automatic'} tokens a batch"
        with explain_out_of_memory(doing, "lower --batch-tokens"):
            if self.adapter.has_attention:
                pooled = torch.cat(self.chunker(windows))
                yield list(range(len(units))), self.adapter(pooled, [unit.num_latents for unit in units])
                return
            for indices, pooled in self.chunker.batches(windows):
                yield indices, self.adapter(pooled, [windows[i].num_latents for i in indices])


def _room_for(num_rows: int, like: torch.Tensor, on_cpu: bool) -> torch.Tensor:
    """An empty tensor [num_rows, D]; on the CPU, where a CUDA device is to fill it, one that it reaches by itself."""
    shape = (num_rows, like.shape[1])
    if on_cpu:
        return torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    return torch.empty(shape, dtype=like.dtype, device=like.device)


class CodeLLaVAModel(nn.Module):
    """A decoder that reads compressed memory.

    Args:
        memory_encoder: Spans to latents.
        decoder: Any Hugging Face causal language model of the adapter's output width.
        eos_token_ids: Ids that end a generation.
        pad_token_id: Filler after the end of shorter generations in a batch.
    """

    def __init__(
        self, memory_encoder: MemoryEncoder, decoder: Any, *, eos_token_ids: Sequence[int] = (), pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.memory_encoder = memory_encoder
        self.decoder = decoder
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        # Encodes in place of `memory_encoder` where no gradients are wanted: the way in for a latent cache.
        self.cached_encoder: Callable[[Sequence[MemorySpan]], list[torch.Tensor]] | None = None

    @property
    def llm_model(self) -> Any:
        """The decoder, under its published name."""
        return self.decoder

    @property
    def code_chunker(self) -> CodeChunker:
        """The encoder part, under its published name."""
        return self.memory_encoder.chunker

    @property
    def config(self) -> CompressionConfig:
        """How this model compresses."""
        return self.memory_encoder.config

    @property
    def device(self) -> torch.device:
        """Where the decoder's embedding table lives."""
        return self.decoder.get_input_embeddings().weight.device

    def encode_memory(self, spans: Sequence[MemorySpan]) -> list[torch.Tensor]:
        """Latents of each span, [n, D]; spans of many prompts are encoded together."""
        if self.cached_encoder is not None and not torch.is_grad_enabled():
            return self.cached_encoder(spans)
        return self.memory_encoder(spans)

    def embed_prompt(self, prompt: MemoryPrompt) -> torch.Tensor:
        """Prompt embeddings [T, D] in the decoder's dtype."""
        return self.embed_prompts([prompt])[0]

    def embed_prompts(self, prompts: Sequence[MemoryPrompt]) -> list[torch.Tensor]:
        """Prompt embeddings of many prompts, their spans encoded together."""
        latents = iter(self.encode_memory([span for prompt in prompts for span in prompt.spans]))
        return [self._splice(prompt, [next(latents) for _ in prompt.spans]) for prompt in prompts]

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[MemoryPrompt], *, max_new_tokens: int = 512, **sampling: Any
    ) -> list[list[int]]:
        """Continue prompts, as one left-padded batch.

        Args:
            prompts: Parsed prompts.
            max_new_tokens: Most new tokens of each.
            sampling: Hugging Face generation arguments (`do_sample`, `temperature`, `top_p`, …); greedy by default. A
                `repetition_penalty` counts the new tokens.

        Returns:
            The new token ids of each prompt, up to and without its end token.

        Raises:
            PromptError: A prompt and its answer are longer than the decoder's positions.
            ConfigError: There is not memory enough.
        """
        if not prompts:
            return []
        self.check_room(prompts, max_new_tokens)
        rows = self.embed_prompts(prompts)
        generated = continue_rows(
            self.decoder,
            rows,
            max_new_tokens=max_new_tokens,
            end_ids=self.eos_token_ids,
            pad_id=self.pad_token_id,
            **sampling,
        )
        return [ids[:-1] if ids and ids[-1] in self.eos_token_ids else ids for ids in generated]

    def check_room(self, prompts: Sequence[MemoryPrompt], max_new_tokens: int = 0) -> None:
        """Refuse prompts that the decoder has no positions for; nothing is ever cut."""
        for number, prompt in enumerate(prompts):
            check_prompt_fits(len(prompt.input_ids), self.decoder.config, max_new_tokens, f"prompt {number}")

    def _splice(self, prompt: MemoryPrompt, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        ids = to_device(np.array(prompt.input_ids), self.device)
        embeds = self.decoder.get_input_embeddings()(ids)
        return splice_spans(embeds, latents, prompt.spans)
