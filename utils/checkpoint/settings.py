"""How the models of a checkpoint run, and how a trainer's state becomes one: values that are passed on whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = ("auto", "stored", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """Where and how the encoder runs; a decoder that is loaded with it takes the first three.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        dtype: One of `DTYPE_NAMES`; "auto" as stored, but float32 in place of the half on a CPU that has no bfloat16 of
            its own, where it is several times as fast.
        attn_implementation: A transformers name (`eager`, `sdpa`, …), with which windows of equal length are batched;
            None: packed encoding wherever the encoder can, transformers' choice for a decoder.
        batch_tokens: Tokens of one encoder pass; None: chosen by device.
        compiled: Compile full micro-batches; see `CodeChunker`.
    """

    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    attn_implementation: str | None = None
    batch_tokens: int | None = None
    compiled: bool = False


AUTOMATIC = EncoderSettings()
ON_CPU = EncoderSettings(device="cpu")
# For weights that are written again, or taken as they are.
AS_STORED = EncoderSettings(device="cpu", dtype="stored")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOptions:
    """How a trainer's state is put into its base.

    Attributes:
        format: One of `utils.checkpoint.convert.states.FORMATS`, or "auto".
        lora_alpha: LoRA alpha of each part ("encoder", "decoder") that has LoRA weights; the state does not say it.
        frozen_from_base: Leave parameters that the state lacks as they are, where otherwise they are an error.
    """

    format: str = "auto"
    lora_alpha: Mapping[str, float] = field(default_factory=dict)
    frozen_from_base: bool = False
