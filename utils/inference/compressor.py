"""Prompts to prompt embeddings, many at a time, with the latent cache and without the decoder.

    compressor = Compressor.load(None, chunk_size=8)                  # the embedded default checkpoint
    prompt = compressor.parse_raw("Explain <|memory_start|>…<|memory_end|>")
    embeds = compressor.compress([prompt])[0]                         # PromptEmbeds, values [T, D]

Of the decoder only the embedding table is opened, memory-mapped. Shape legend: T prompt rows, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.files import provenance
from utils.inference.checkpoint import CheckpointFiles, find_checkpoint
from utils.inference.latent_cache import LatentCache, window_key
from utils.inference.prompt_embeds import CompressionStats, PromptEmbeds
from utils.inference.weights import (
    check_vocabulary,
    load_decoder_config,
    load_embedding_table,
    load_memory_encoder,
    load_tokenizers,
    resolve_dtype,
)
from utils.model.code_llava_model import MemoryEncoder, MemoryUnit, check_prompt_fits
from utils.model.processor import Processor
from utils.model.prompt import MemoryLimit, MemoryPrompt, MemorySpan
from utils.model.splice import splice_latents


class Compressor:
    """Encoder, adapter, tokenizers and the decoder's embedding table of one checkpoint.

    Args:
        files: The checkpoint.
        processor: Parses prompts for it.
        memory_encoder: Its encoder and adapter.
        table_VD: Its decoder's embedding table.
        dtype: Dtype of the prompt embeddings; None for the table's own.
        cache: Latents of earlier compressions; None to encode everything.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        processor: Processor,
        memory_encoder: MemoryEncoder,
        table_VD: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        cache: LatentCache | None = None,
    ) -> None:
        self.files = files
        self.processor = processor
        self.memory_encoder = memory_encoder
        self.cache = cache
        self.dtype = dtype or table_VD.dtype
        self._table_VD = table_VD
        self._decoder_config = load_decoder_config(files)
        self._namespaces: dict[int, bytes] = {}

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        *,
        chunk_size: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        batch_tokens: int | None = None,
        limit: MemoryLimit | None = None,
        cache: LatentCache | None = None,
    ) -> Compressor:
        """Load what compressing needs of a checkpoint.

        Args:
            checkpoint: Folder or hub id; None for the embedded default.
            chunk_size: Encoder tokens per latent; None for the checkpoint's own.
            device: "auto", "cpu", "cuda" or "cuda:<number>".
            dtype: "float32", "bfloat16", "float16"; None as stored.
            attn_implementation: See `load_memory_encoder`.
            batch_tokens: Tokens of one encoder pass; None: chosen by device.
            limit: Longest allowed span.
            cache: Latents of earlier compressions.

        Raises:
            CheckpointError: The checkpoint is missing, incomplete or inconsistent.
            ConfigError: It cannot serve the chunk size, or the device is not there.
        """
        files = find_checkpoint(checkpoint, chunk_size)
        tokenizers = load_tokenizers(files)
        encoder = load_memory_encoder(
            files,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            batch_tokens=batch_tokens,
            tokenizer=tokenizers.encoder,
        )
        processor = Processor(tokenizers=tokenizers, chunk_size=files.config.chunk_size, limit=limit)
        table_VD = load_embedding_table(files)
        check_vocabulary(tokenizers.decoder, table_VD, files.decoder)
        return cls(files, processor, encoder, table_VD, dtype=resolve_dtype(dtype), cache=cache)

    @property
    def width(self) -> int:
        """Columns of the prompt embeddings: the decoder's width."""
        return int(self._table_VD.shape[1])

    def parse_raw(self, text: str, chunk_size: int | Sequence[int] | None = None) -> MemoryPrompt:
        """Parse one text; see `utils.model.prompt.parse_raw_prompt`."""
        return self.processor.parse_raw(text, chunk_size)

    def parse_chat(
        self, messages: Sequence[Mapping[str, Any]], chunk_size: int | Sequence[int] | None = None, **template: Any
    ) -> MemoryPrompt:
        """Parse a chat; see `utils.model.prompt.parse_chat_prompt`."""
        return self.processor.parse_chat(messages, chunk_size, **template)

    @torch.inference_mode()
    def compress(self, prompts: Sequence[MemoryPrompt]) -> list[PromptEmbeds]:
        """Turn prompts into prompt embeddings; the spans of all of them are encoded together.

        Returns:
            One `PromptEmbeds` a prompt, in order, on the CPU.

        Raises:
            PromptError: A prompt is longer than the decoder's positions, or a chunk size does not fit.
        """
        for number, prompt in enumerate(prompts):
            check_prompt_fits(len(prompt.input_ids), self._decoder_config, name=f"prompt {number}")
        encoded = iter(self.encode_spans([span for prompt in prompts for span in prompt.spans]))
        return [self.embed(prompt, [next(encoded) for _ in prompt.spans]) for prompt in prompts]

    @torch.inference_mode()
    def encode_spans(self, spans: Sequence[MemorySpan]) -> list[tuple[torch.Tensor, int]]:
        """Latents [n, D] of each span on the CPU, and how many of its tokens came from the cache."""
        units_of_spans = [self.memory_encoder.units(span) for span in spans]
        units = [unit for span_units in units_of_spans for unit in span_units]
        keys = [self._key(unit) for unit in units] if self.cache else []
        found: list[torch.Tensor | None] = self.cache.get_many(keys) if self.cache else [None] * len(units)
        missing = [i for i, known in enumerate(found) if known is None]
        fresh = [rows.cpu() for rows in self.memory_encoder.encode_units([units[i] for i in missing])]
        if self.cache and missing:
            self.cache.put_many([keys[i] for i in missing], fresh)
        fresh_at = dict(zip(missing, fresh, strict=True))
        latents = [fresh_at[i] if known is None else known for i, known in enumerate(found)]
        results, at = [], 0
        for span_units in units_of_spans:
            here = range(at, at + len(span_units))
            cached_tokens = sum(units[i].num_tokens for i in here if i not in fresh_at)
            results.append((_join([latents[i] for i in here]), cached_tokens))
            at += len(span_units)
        return results

    def provenance(self) -> dict[str, Any]:
        """What the sidecar of an output says about where it came from."""
        return {
            "checkpoint": self.files.root.name,
            "fingerprint": self.files.fingerprint,
            "config": self.files.config.to_json(),
            "encoder_dtype": str(self.memory_encoder.chunker.encoder.dtype).removeprefix("torch."),
            **provenance(),
        }

    def embed(self, prompt: MemoryPrompt, encoded: Sequence[tuple[torch.Tensor, int]]) -> PromptEmbeds:
        """Splice what `encode_spans` gave for a prompt's spans into its embedding rows."""
        rows_TD = self._table_VD[torch.tensor(prompt.input_ids)].to(self.dtype)
        places = tuple((span.start, span.stop) for span in prompt.spans)
        return PromptEmbeds(
            values_TD=splice_latents(rows_TD, [latents for latents, _ in encoded], places),
            spans=places,
            stats=CompressionStats(
                memory_tokens=prompt.memory_tokens,
                num_latents=prompt.num_latents,
                prompt_tokens=len(prompt.input_ids),
                cached_tokens=sum(cached for _, cached in encoded),
            ),
            provenance=self.provenance(),
        )

    def _key(self, unit: MemoryUnit) -> bytes:
        first, last = unit.windows[0], unit.windows[-1]
        core = first.core if len(unit.windows) == 1 else [token for window in unit.windows for token in window.core]
        return window_key(self._namespace(first.chunk_size), first.left, core, last.right)

    def _namespace(self, chunk_size: int) -> bytes:
        """Everything but the tokens that decides a latent's bits."""
        if chunk_size not in self._namespaces:
            dtype = self.memory_encoder.chunker.encoder.dtype
            self._namespaces[chunk_size] = f"{self.files.fingerprint} {chunk_size} {dtype}".encode()
        return self._namespaces[chunk_size]


def _join(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` of CPU rows by plain copying: on a busy machine, waking torch's threads costs more than the copy."""
    data = np.concatenate([part.contiguous().view(torch.uint8).numpy() for part in rows])
    return torch.from_numpy(data).view(rows[0].dtype)
