"""Block-diagonal attention for packed rows: sequences laid end to end without padding, none seeing another.

Everything but attention works token by token, so a model may run on one long row [1, T] of many sequences: only here
do their borders matter. Used for encoding (windows as sequences) and for training (documents as sequences).

    segments = Segments.of([512, 512, 37], causal=True)
    use_packed_attention(model)
    model(input_ids=row_1T, position_ids=positions_1T, segments=segments)

Sequences of equal length that lie side by side are attended as one batch, so sort by length where the order is free. On
CUDA, where a kernel's launch costs more than a short sequence's attention, sequences of several lengths go through
torch's variable-length flash attention in one call.
Shape legend: T packed tokens, h query heads, g key/value heads, K head width, b sequences in a run, l their length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from utils.errors import ConfigError
from utils.model.transfer import to_device

PACKED = "code_llava_packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Where the sequences of a packed row lie.

    Attributes:
        runs: `(start, count, length)` of neighbouring sequences of one length.
        causal: Whether a token sees only the tokens before it in its own sequence.
    """

    runs: tuple[tuple[int, int, int], ...]
    causal: bool

    @classmethod
    def of(cls, lengths: Sequence[int], *, causal: bool) -> Segments:
        """Describe sequences of these lengths, laid end to end in this order."""
        runs: list[tuple[int, int, int]] = []
        start = 0
        for length in lengths:
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
            start += length
        return cls(runs=tuple(runs), causal=causal)


def supports_packed_attention(model: Any) -> bool:
    """Whether a Hugging Face model's attention can be replaced by ours without changing what it computes."""
    config = model.config
    special = ("attn_logit_softcapping", "position_embedding_type", "attention_chunk_size")
    plain = all(getattr(config, name, None) in (None, "absolute") for name in special)
    return bool(getattr(model, "_supports_attention_backend", False)) and plain


def use_packed_attention(model: Any) -> None:
    """Switch a Hugging Face model to packed rows; its calls then need `segments=`."""
    model.set_attn_implementation(PACKED)


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend inside each sequence of a packed row; the signature is transformers' attention interface.

    Args:
        module: The attention layer that calls.
        query: [1, h, T, K].
        key: [1, g, T, K] with g dividing h.
        value: [1, g, T, K].
        attention_mask: Must be None, the segments say it all.
        scaling: Factor on the scores; 1/sqrt(K) by default.
        dropout: Probability of dropping an attention weight.
        segments: The sequences of the row.
        sliding_window: Tokens that a token sees back, itself included, in models that have this.
        unused: What transformers passes to every attention function and this one does not need.

    Returns:
        [1, T, h, K] and None for the attention weights.
    """
    if segments is None:
        raise ConfigError("packed attention was called without segments: pass segments=Segments.of(…) to the model")
    if unused.get("s_aux") is not None or unused.get("softcap") is not None:
        raise ConfigError(f"{type(module).__name__} needs attention sinks or soft caps, which packed rows do not have")
    assert attention_mask is None
    assert query.shape[0] == 1
    kernel = None if dropout or len(segments.runs) == 1 else varlen_kernel(query)
    if kernel is not None:
        return _varlen_attention(kernel, query, key, value, segments, scaling, sliding_window), None
    pieces = []
    # Split, not sliced run by run: the gradient of a slice is a whole row of zeros.
    sizes = [count * length for _, count, length in segments.runs]
    parts = zip(*(x.squeeze(0).split(sizes, dim=1) for x in (query, key, value)), strict=True)
    for (_, count, length), part in zip(segments.runs, parts, strict=True):
        # [h, b·l, K] → [b, h, l, K]: views, nothing is copied
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in part)
        mask = None
        if sliding_window is not None and length > sliding_window:
            offsets = torch.arange(length, device=q.device)
            distance = offsets[:, None] - offsets[None, :]
            mask = distance.abs() < sliding_window
            if segments.causal:
                mask &= distance >= 0
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=segments.causal and mask is None and length > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None], None


def varlen_kernel(query: torch.Tensor) -> Callable[..., Any] | None:
    """Torch's variable-length attention where it serves: half precision, on an Ampere card or newer."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    width = query.shape[-1]
    if width > 256 or width % 8 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _varlen_attention(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All sequences in one call; [1, T, h, K]."""
    borders, longest = _borders(segments.runs, query.device)
    reach = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    # Before torch 2.15 the kernel shares key/value heads without being told, and knows no such argument.
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if _is_told_of_groups(kernel) else {}
    out: torch.Tensor = kernel(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(reach, 0 if segments.causal else reach),
        **grouped,
    )
    return out[None]


@cache
def _is_told_of_groups(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(kernel).parameters


@lru_cache(maxsize=8)
def _borders(runs: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """Where each sequence begins and the last one ends, int32, once for all layers; and the longest length."""
    lengths = np.repeat([length for _, _, length in runs], [count for _, count, _ in runs])
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    with torch.inference_mode(False):  # what is kept here may serve training next
        return to_device(borders, device), int(lengths.max())


AttentionInterface.register(PACKED, packed_attention_forward)
