"""How an encoder runs: one value, built once – from a command's flags or by a caller – and passed on whole."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_NAMES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """Where and how the models of a checkpoint run.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        dtype: One of `DTYPE_NAMES`; "auto" as stored.
        attn_implementation: A transformers name (`eager`, `sdpa`, …) to batch equal windows with it; None for packed
            rows wherever the encoder can run them.
        batch_tokens: Tokens of one encoder pass; None: chosen by device.
        compiled: Compile full micro-batches of the encoder; see `CodeChunker`.
    """

    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_tokens: int | None = None
    compiled: bool = False
