"""Token ids → windows → hidden states → one pooled vector a chunk.

    chunker = CodeChunker(encoder, config, pad_token_id=0)
    pooled = chunker(plan_windows(token_ids, config))    # one [n, E] tensor a window

All windows of a call, whatever span or prompt they come from, are packed end to end without padding; windows never see
each other, so packing, order and batch size change nothing but rounding. Encoders that cannot run packed are batched by
equal window length instead: also without padding, on any attention implementation.

Semantics: LCLM, "End-to-End Context Compression at Scale", arXiv 2606.09659.

Shape legend: T packed tokens, H encoder width, R chunk size, N chunks of a batch, n chunks of a window, E pooled width,
F token columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.errors import ConfigError
from utils.model.config import CompressionConfig
from utils.model.limits import free_device_bytes
from utils.model.packed_attention import Segments, supports_packed_attention, use_packed_attention
from utils.model.pooling import POOLINGS, Pooling
from utils.model.transfer import to_device
from utils.model.windows import Window, micro_batches

# Token embeddings keep their places: they are there to be told apart.
_TOKEN_POOLING = POOLINGS["rotary"]
# Tokens of one encoder pass. Enough to keep matrix products at full speed, small enough to keep memory flat.
_CPU_TOKENS, _MOST_CUDA_TOKENS, _LEAST_CUDA_TOKENS = 4096, 65536, 1024


class CodeChunker(nn.Module):
    """The encoder part: windows to pooled hidden states.

    Args:
        encoder: A Hugging Face encoder or decoder-only model without its head.
        config: How the checkpoint compresses.
        pad_token_id: The encoder tokenizer's pad token, the marker that eos pooling appends.
        packed: Run on packed rows where the encoder can.
        batch_tokens: Tokens of one encoder pass; None: chosen by device.
        compiled: Run full micro-batches, which all have one shape, through `torch.compile`: on CUDA as captured graphs.
            The first of them takes up to a minute, so it pays for long work only.
        tokenizer: The encoder's tokenizer, kept for callers that hold text rather than tokens.

    Raises:
        ConfigError: eos pooling without a pad token, windows longer than the encoder's positions, micro-batches of
            less than one token, compiling without packed rows.
    """

    def __init__(
        self,
        encoder: Any,
        config: CompressionConfig,
        *,
        pad_token_id: int | None = None,
        packed: bool = True,
        batch_tokens: int | None = None,
        compiled: bool = False,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        if config.pooling == "eos" and pad_token_id is None:
            raise ConfigError("eos pooling needs a pad token in the encoder's tokenizer; it has none")
        if config.pooling == "rotary" and encoder.config.hidden_size % 2:
            raise ConfigError(
                f"rotary pooling needs an encoder of even width, this one has {encoder.config.hidden_size}"
            )
        if batch_tokens is not None and batch_tokens < 1:
            raise ConfigError(f"--batch-tokens must be at least 1, got {batch_tokens}")
        self.packed = packed and supports_packed_attention(encoder)
        if compiled and not self.packed:
            raise ConfigError(f"only packed rows are compiled, and {type(encoder).__name__} does not run them here")
        self.encoder = encoder
        self.config = config
        self.pad_token_id = pad_token_id
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.compiled = compiled
        self._pass_tokens: dict[torch.device, int] = {}
        if self.packed:
            use_packed_attention(encoder)

    @property
    def pooling(self) -> Pooling:
        """How a chunk's states become one vector."""
        return POOLINGS[self.config.pooling]

    @property
    def width(self) -> int:
        """E, the width of a pooled vector, without token columns."""
        return self.pooling.width(int(self.encoder.config.hidden_size), self.config.chunk_size)

    @property
    def token_width(self) -> int:
        """F, how many columns of token embeddings stand behind the E; 0 where there are none.

        Raises:
            ConfigError: The embeddings cannot be turned by their places.
        """
        if not self.config.token_columns:
            return 0
        table_width = int(self.encoder.get_input_embeddings().weight.shape[1])
        if table_width % 2:
            raise ConfigError(f"token_columns: expected an encoder with embeddings of even width, got {table_width}")
        return _TOKEN_POOLING.width(table_width, self.config.chunk_size)

    @property
    def device(self) -> torch.device:
        """Where the encoder lives."""
        return next(self.encoder.parameters()).device

    def forward(self, windows: Sequence[Window]) -> list[torch.Tensor]:
        """Encode and pool windows.

        Returns:
            One [n, E + F] tensor a window, in the order given, in the encoder's dtype.
        """
        results: list[torch.Tensor] = [torch.empty(0)] * len(windows)
        for indices, pooled_NE in self.batches(windows):
            parts = pooled_NE.split([windows[i].num_latents for i in indices])
            for i, part in zip(indices, parts, strict=True):
                results[i] = part
        return results

    def batches(self, windows: Sequence[Window]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Encode micro-batch by micro-batch, so that a long memory needs no more room than a short one.

        Yields:
            The indices of the windows of a micro-batch, and their pooled vectors end to end, [N, E + F].
        """
        sizes = [(window.chunk_size, window.num_tokens) for window in windows]
        for indices in micro_batches(sizes, self.pass_tokens):
            batch = [windows[i] for i in indices]
            rows = [self._encoder_tokens(window) for window in batch]
            states = [(self._hidden_states(rows), self.pooling)]
            if self.config.token_columns:
                ids_T = self._to_device(np.concatenate(rows))
                states.append((self.encoder.get_input_embeddings()(ids_T), _TOKEN_POOLING))
            yield indices, self._pool(batch, states)

    @cached_property
    def _first_position(self) -> int:
        """0; in encoders of RoBERTa's kind, whose table keeps rows for padding in front, the row behind those."""
        tables = (m for name, m in self.encoder.named_modules() if name.endswith("position_embeddings"))
        padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
        return padding[0] + 1 if padding else 0

    @property
    def pass_tokens(self) -> int:
        """Most tokens of one encoder pass: as asked for; else by device, on CUDA by its free memory."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        device = self.device
        if device not in self._pass_tokens:
            free = free_device_bytes(device)
            self._pass_tokens[device] = tokens_that_fit(self.encoder, free)
        return self._pass_tokens[device]

    @cached_property
    def _compiled_encoder(self) -> Any:
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        return torch.compile(self.encoder, mode=mode, dynamic=False)

    def _encoder_tokens(self, window: Window) -> np.ndarray:
        marks = [self.pad_token_id] * window.num_latents if self.pooling.reads_marks else []
        return np.concatenate(
            [np.asarray(part, dtype=np.int64) for part in (window.left, window.core, window.right, marks)]
        )

    def _hidden_states(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """Last hidden states of all rows end to end, [T, H]."""
        longest = max(len(row) for row in rows)
        room = getattr(self.encoder.config, "max_position_embeddings", None)
        if room is not None and longest > room - self._first_position:
            raise ConfigError(
                f"a window of {longest} tokens (with overlap and markers) is longer than the encoder's {room} "
                f"positions: use a checkpoint with a smaller encoder_window_size (now {self.config.window})"
            )
        lengths = [len(row) for row in rows]
        if self.packed:
            return self._forward_packed(rows, lengths)
        starts = [0, *np.flatnonzero(np.diff(lengths)) + 1, len(rows)]
        groups = [self._forward_equal(rows[a:b]) for a, b in itertools.pairwise(starts)]
        return torch.cat(groups)

    def _forward_packed(self, rows: Sequence[np.ndarray], lengths: list[int]) -> torch.Tensor:
        positions = np.concatenate([np.arange(length) for length in lengths]) + self._first_position
        # The one shape that comes again and again: as many of the longest windows as a micro-batch holds.
        full = len(set(lengths)) == 1 and lengths[0] >= self.config.window
        full = full and len(lengths) == max(1, self.pass_tokens // lengths[0])
        return self._call(
            self._compiled_encoder if self.compiled and full else self.encoder,
            input_ids=self._to_device(np.concatenate(rows))[None],
            position_ids=self._to_device(positions)[None],
            segments=Segments.of(lengths, causal=self.config.causal),
        )[0]

    def _forward_equal(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        ids_BL = self._to_device(np.stack(rows))
        length = ids_BL.shape[1]
        reach = getattr(self.encoder.config, "sliding_window", None)
        if reach is not None and length > reach:
            raise ConfigError(
                f"this encoder's tokens see {reach} tokens back and a window has {length}: leave --attn-implementation "
                "unset, packed rows handle that"
            )
        # A mask of our own, so that the result does not hang on what the attention implementation assumes.
        seen = torch.ones(length, length, dtype=torch.bool, device=ids_BL.device)
        if self.config.causal:
            seen = seen.tril()
        dtype = next(self.encoder.parameters()).dtype
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        positions = (torch.arange(length, device=ids_BL.device) + self._first_position).expand(len(rows), -1)
        mask = bias[None, None].expand(len(rows), 1, -1, -1)
        return self._call(self.encoder, input_ids=ids_BL, position_ids=positions, attention_mask=mask).flatten(0, 1)

    def _call(self, encoder: Any, **inputs: Any) -> torch.Tensor:
        if getattr(self.encoder.config, "type_vocab_size", 0):
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return encoder(**inputs, use_cache=False).last_hidden_state

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)

    def _pool(self, windows: Sequence[Window], states: Sequence[tuple[torch.Tensor, Pooling]]) -> torch.Tensor:
        """Pool a micro-batch, [N, E + F], its windows end to end; all chunks of one size share a gather.

        `states` are [T, H] each, and how they are pooled.
        """
        counts = np.array([w.num_latents for w in windows])
        offsets = np.cumsum([0, *(w.num_tokens + (w.num_latents if self.pooling.reads_marks else 0) for w in windows)])
        if self.pooling.reads_marks:
            # Markers stand last in their window, in the order of their latents.
            first = np.repeat(offsets[1:] - counts, counts) + _ranges(counts)
            return self._pool_chunks(states, first, np.ones_like(first), 1)
        # From here on a row for each window and chunk size at which it is pooled.
        owners = np.repeat(np.arange(len(windows)), [len(w.chunk_sizes) for w in windows])
        sizes = np.array([size for w in windows for size in w.chunk_sizes])
        counts = np.array([count for w in windows for count in w.latents_by_size])
        cores = np.array([len(w.core) for w in windows])[owners]
        begins = (offsets[:-1] + [len(w.left) for w in windows])[owners]
        pooled = []
        for size in np.unique(sizes):
            chosen = sizes == size
            # Chunks of a window: 0, R, 2R, … tokens after the beginning of its core; the last one may be short.
            chunk = _ranges(counts[chosen]) * size
            first = np.repeat(begins[chosen], counts[chosen]) + chunk
            real = np.minimum(np.repeat(cores[chosen], counts[chosen]) - chunk, size)
            pooled.append(self._pool_chunks(states, first, real, int(size)))
        # Sorted by size now, as the windows of a micro-batch are; not so where one is pooled at several sizes.
        order = np.argsort(sizes, kind="stable")
        whole = torch.cat(pooled)
        if (np.diff(order) == 1).all():
            return whole
        parts = whole.split(counts[order].tolist())
        return torch.cat([parts[i] for i in np.argsort(order)])

    def _pool_chunks(
        self, states: Sequence[tuple[torch.Tensor, Pooling]], first: np.ndarray, real: np.ndarray, size: int
    ) -> torch.Tensor:
        """Pool chunks of `real` ≤ `size` states that begin at `first`; what several states give stands side by side."""
        within = np.arange(size)
        # Places beyond a short last chunk repeat its first token here and are blanked below.
        index_NR = self._to_device(first[:, None] + np.where(within < real[:, None], within, 0))
        blank_NR1 = self._to_device(within >= real[:, None])[..., None] if (real < size).any() else None
        real_N1, columns = self._to_device(real)[:, None], []
        for states_TH, pooling in states:
            states_NRH = states_TH[index_NR]
            if blank_NR1 is not None:
                states_NRH = states_NRH.masked_fill(blank_NR1, 0)
            columns.append(pooling.pool(states_NRH, real_N1).to(states[0][0].dtype))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def tokens_that_fit(encoder: Any, free_bytes: int | None) -> int:
    """How many tokens an encoder pass takes at most; None for the CPU, which has room for as many as it needs.

    A quarter of the free memory is for one layer's activations: a layer's input, norm, queries, keys, values, attention
    and output, and the two sides of the gated MLP with their product. The next layer's take the same place.
    """
    if free_bytes is None:
        return _CPU_TOKENS
    config = encoder.config
    middle = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_per_token = (8 * config.hidden_size + 3 * middle) * encoder.dtype.itemsize
    return max(_LEAST_CUDA_TOKENS, min(_MOST_CUDA_TOKENS, free_bytes // 4 // bytes_per_token))


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0..c-1 for each count c, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)
