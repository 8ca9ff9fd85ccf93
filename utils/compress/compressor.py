"""Prompts to prompt embeddings, many at a time, with the latent cache and without the decoder.

    compressor = Compressor.load(None, chunk_size=8)                  # the embedded default checkpoint
    prompt = compressor.parse_raw("Explain <|memory_start|>…<|memory_end|>")
    embeds = compressor.compress([prompt])[0]                         # PromptEmbeds, values [T, D]

Of the decoder only the embedding table is opened, memory-mapped. Shape legend: T prompt rows, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import (
    check_vocabulary,
    load_embedding_table,
    load_memory_encoder,
    load_tokenizers,
    resolve_dtype,
)
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import AUTOMATIC, EncoderSettings
from utils.compress.expander import Expander
from utils.compress.latent_cache import LatentCache
from utils.compress.prompt_embeds import CompressionStats, ExpandedText, PromptEmbeds
from utils.compress.select import Expansion
from utils.compress.span_encoder import SpanEncoder
from utils.files import provenance
from utils.model.code_llava_model import MemoryEncoder
from utils.model.limits import check_prompt_fits
from utils.model.processor import Processor
from utils.model.prompt import MemoryLimit, MemoryPrompt, MemorySpan
from utils.model.splice import splice_spans


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
        self._span_encoder = SpanEncoder(memory_encoder, files.fingerprint if cache else "", cache)
        self.dtype = dtype or table_VD.dtype
        self._table_VD = table_VD
        self._expander = Expander(processor.tokenizers, self._span_encoder)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        *,
        chunk_size: int | None = None,
        settings: EncoderSettings = AUTOMATIC,
        limit: MemoryLimit | None = None,
        cache: LatentCache | None = None,
    ) -> Compressor:
        """Load what compressing needs of a checkpoint.

        Args:
            checkpoint: Folder or hub id; None for the embedded default.
            chunk_size: Encoder tokens per latent; None for the checkpoint's own.
            settings: Where and how the encoder runs; its dtype is the prompt embeddings', too.
            limit: Longest allowed span.
            cache: Latents of earlier compressions.

        Raises:
            CheckpointError: The checkpoint is missing, incomplete or inconsistent.
            ConfigError: It cannot serve the chunk size, or the device is not there.
        """
        files = find_checkpoint(checkpoint, chunk_size)
        tokenizers = load_tokenizers(files)
        encoder = load_memory_encoder(files, settings, tokenizer=tokenizers.encoder)
        processor = Processor(tokenizers=tokenizers, chunk_size=files.config.chunk_size, limit=limit)
        table_VD = load_embedding_table(files)
        check_vocabulary(tokenizers.decoder, table_VD, files.decoder)
        return cls(files, processor, encoder, table_VD, dtype=resolve_dtype(settings.dtype), cache=cache)

    @property
    def width(self) -> int:
        """Columns of the prompt embeddings: the decoder's width."""
        return int(self._table_VD.shape[1])

    @property
    def max_positions(self) -> int | None:
        """Longest prompt that the decoder reads, in rows; None where its configuration does not say."""
        return getattr(self.files.decoder_config, "max_position_embeddings", None)

    def parse_raw(self, text: str, chunk_size: int | Sequence[int] | None = None) -> MemoryPrompt:
        """Parse one text; see `utils.model.prompt.parse_raw_prompt`."""
        return self.processor.parse_raw(text, chunk_size)

    def parse_chat(
        self, messages: Sequence[Mapping[str, Any]], chunk_size: int | Sequence[int] | None = None, **template: Any
    ) -> MemoryPrompt:
        """Parse a chat; see `utils.model.prompt.parse_chat_prompt`."""
        return self.processor.parse_chat(messages, chunk_size, **template)

    def expand(self, prompt: MemoryPrompt, expansion: Expansion | None) -> MemoryPrompt:
        """The prompt with text in place of some latents; see `utils.compress.expander.Expander`.

        Raises:
            PromptError: There is nothing to select by.
            ConfigError: The encoder has no fast tokenizer, or the policy knows too little.
        """
        return self._expander(prompt, expansion)

    @torch.inference_mode()
    def compress(self, prompts: Sequence[MemoryPrompt], expansion: Expansion | None = None) -> list[PromptEmbeds]:
        """Turn prompts into prompt embeddings; the spans of all of them are encoded together.

        Args:
            prompts: Parsed.
            expansion: What of each prompt's memory stays text; None: nothing.

        Returns:
            One `PromptEmbeds` a prompt, in order, on the CPU.

        Raises:
            PromptError: A prompt is longer than the decoder's positions, or a chunk size does not fit; or as `expand`.
        """
        prompts = [self.expand(prompt, expansion) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            check_prompt_fits(len(prompt.input_ids), self.files.decoder_config, name=f"prompt {number}")
        encoded = iter(self.encode_spans([span for prompt in prompts for span in prompt.spans]))
        return [self.embed(prompt, [next(encoded) for _ in prompt.spans]) for prompt in prompts]

    def encode_spans(
        self, spans: Sequence[MemorySpan], salts: Sequence[bytes] = (), stopped: Callable[[], bool] | None = None
    ) -> list[tuple[torch.Tensor, int]]:
        """Latents [n, D] of each span on the CPU, and its tokens from the cache; see `SpanEncoder.encode`."""
        return self._span_encoder.encode(spans, salts, stopped)

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
        return PromptEmbeds(
            values_TD=splice_spans(rows_TD, [latents for latents, _ in encoded], prompt.spans),
            spans=tuple((span.start, span.stop) for span in prompt.spans),
            expanded=tuple(
                ExpandedText(span=number, rows=segment.rows, chars=segment.chars)
                for number, span in enumerate(prompt.spans)
                for segment in span.segments
            ),
            stats=CompressionStats(
                memory_tokens=prompt.memory_tokens,
                num_latents=prompt.num_latents,
                text_rows=prompt.text_rows,
                prompt_tokens=len(prompt.input_ids),
                cached_tokens=sum(cached for _, cached in encoded),
            ),
            provenance=self.provenance(),
        )
