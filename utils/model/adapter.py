"""The adapter: from the encoder's width to the decoder's, one vector at a time, optionally with attention layers.

    mlp        RMSNorm → Linear → GELU (exact) → Linear
    attn_mlp   attention layers of the encoder's size, then the MLP
    mlp_attn   the MLP, then attention layers of the decoder's size

With `token_columns` there is a second way into the MLP: RMSNorm → Linear of the pooled token embeddings, added before
the GELU. Its matrix begins at zero, so that an adapter that gets it gives the latents that it gave before.

The attention layers are stock Qwen3 decoder layers without a causal mask, with RoPE positions 0..n-1 inside one span.
State-dict keys are LCLM's (arXiv 2606.09659), but for `token_norm` and `token_fc`. Shape legend: N latents of all spans
end to end, E input width, F token columns, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from utils.model.config import CompressionConfig
from utils.model.packed_attention import PACKED, Segments

NORM_EPS = 1e-6


class Adapter(nn.Module):
    """Projects pooled hidden states into the decoder's embedding space.

    Args:
        input_width: E: `CodeChunker.width`.
        output_width: D, the decoder's width.
        token_width: F: `CodeChunker.token_width`, 0 without token columns.
        middle_width: Width between the two linear maps; D in published checkpoints.
        config: Which kind of adapter.
        layer_config: Hugging Face configuration that sizes the attention layers: the encoder's for attn_mlp, the
            decoder's for mlp_attn; not needed for mlp.
    """

    def __init__(
        self,
        input_width: int,
        output_width: int,
        *,
        config: CompressionConfig,
        token_width: int = 0,
        middle_width: int | None = None,
        layer_config: Any = None,
    ) -> None:
        super().__init__()
        middle_width = middle_width or output_width
        self.kind = config.adapter
        self.norm = nn.RMSNorm(input_width, eps=NORM_EPS)
        self.fc1 = nn.Linear(input_width, middle_width)
        self.fc2 = nn.Linear(middle_width, output_width)
        self.token_width = 0
        if token_width:
            self.add_token_columns(token_width)
        if self.has_attention:
            self.attention_layers = nn.ModuleList(
                _AttentionLayer(_qwen3_config(layer_config)) for _ in range(config.num_adapter_layers)
            )

    def add_token_columns(self, token_width: int) -> None:
        """Let it read F token columns as well; at first they change nothing."""
        weight = self.fc1.weight
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.token_norm = nn.RMSNorm(token_width, eps=NORM_EPS, **place)
        self.token_fc = nn.Linear(token_width, weight.shape[0], bias=False, **place)
        nn.init.zeros_(self.token_fc.weight)
        self.token_width = token_width

    @property
    def has_attention(self) -> bool:
        """Whether a latent depends on the other latents of its span."""
        return self.kind != "mlp"

    def forward(self, pooled_NE: torch.Tensor, span_lengths: Sequence[int]) -> torch.Tensor:
        """Project pooled states.

        Args:
            pooled_NE: [N, E], with token columns [N, E + F], the spans end to end.
            span_lengths: Latents of each span, adding up to N.

        Returns:
            [N, D], same dtype and device.
        """
        if self.kind == "attn_mlp":
            pooled_NE = self._attend(pooled_NE, span_lengths)
        # In training the adapter may be kept in float32 behind an encoder in bfloat16.
        pooled_NE = pooled_NE.to(self.norm.weight.dtype)
        if self.token_width:
            pooled_NE, tokens_NF = pooled_NE.split([pooled_NE.shape[1] - self.token_width, self.token_width], dim=1)
            middle = self.fc1(self.norm(pooled_NE)) + self.token_fc(self.token_norm(tokens_NF))
        else:
            middle = self.fc1(self.norm(pooled_NE))
        latents_ND = self.fc2(nn.functional.gelu(middle))
        if self.kind == "mlp_attn":
            latents_ND = self._attend(latents_ND, span_lengths)
        return latents_ND

    def _attend(self, rows: torch.Tensor, span_lengths: Sequence[int]) -> torch.Tensor:
        segments = Segments.of(span_lengths, causal=False)
        positions = torch.cat([torch.arange(length, device=rows.device) for length in span_lengths])[None]
        rows = rows[None]
        for layer in self.attention_layers:
            rows = layer(rows, positions, segments)
        return rows[0]


class _AttentionLayer(nn.Module):
    """One Qwen3 decoder layer, named as LCLM names it on disk."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        # The index only matters to a key-value cache, which there is none of here.
        self.decoder_layer = Qwen3DecoderLayer(config, layer_idx=0)
        self.rotary_embedding = Qwen3RotaryEmbedding(config)

    def forward(self, rows: torch.Tensor, positions: torch.Tensor, segments: Segments) -> torch.Tensor:
        out = self.decoder_layer(
            rows,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=self.rotary_embedding(rows, positions),
            segments=segments,
        )
        return out[0] if isinstance(out, tuple) else out


def _qwen3_config(source: Any) -> Qwen3Config:
    """The sizes of any decoder-like configuration as a Qwen3 configuration with packed attention."""
    names = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
        "rms_norm_eps", "rope_parameters", "attention_bias", "attention_dropout", "max_position_embeddings",
    )  # fmt: skip
    values = {name: getattr(source, name) for name in names if getattr(source, name, None) is not None}
    values.setdefault("num_key_value_heads", source.num_attention_heads)
    values.setdefault("head_dim", source.hidden_size // source.num_attention_heads)
    config = Qwen3Config(**values, num_hidden_layers=1, attn_implementation=PACKED)
    config._attn_implementation = PACKED
    return config
