"""Encoding written down plainly: one window at a time, no packing, explicit masks, loops over chunks.

It shares nothing with `utils.model` but the weights, so the fast code is held against it.
Semantics: LCLM, "End-to-End Context Compression at Scale", arXiv 2606.09659.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from utils.model.config import CompressionConfig
from utils.model.prompt import MemoryPrompt


def reference_latents(
    encoder: Any,
    adapter_state: dict[str, torch.Tensor],
    layer_config: Any,
    ids: Sequence[int],
    config: CompressionConfig,
    pad_token_id: int,
) -> torch.Tensor:
    """Latents of one span, [n, D], computed with an encoder whose attention is `eager`."""
    pooled = torch.cat([_window(encoder, ids, at, config, pad_token_id) for at in range(0, len(ids), config.window)])
    extra = torch.cat([_tokens(encoder, ids, at, config) for at in range(0, len(ids), config.window)])
    if config.adapter == "attn_mlp":
        pooled = _attention_layers(adapter_state, layer_config, pooled)
    latents = _mlp(adapter_state, pooled, extra if config.token_columns else None)
    if config.adapter == "mlp_attn":
        latents = _attention_layers(adapter_state, layer_config, latents)
    return latents


def next_token_losses(model: Any, processor: Any, prompt: MemoryPrompt, target: str) -> torch.Tensor:
    """What a whole model loses on each token of a target and on its end, one prompt alone in its row."""
    ids = torch.tensor([*prompt.input_ids, *processor.target_ids(target)])
    rows = model.embed_prompt(MemoryPrompt(input_ids=ids.tolist(), spans=prompt.spans))
    first = len(prompt.input_ids)
    log_probs = model.decoder(inputs_embeds=rows[None]).logits[0, first - 1 : -1].log_softmax(dim=-1)
    return -log_probs.gather(1, ids[first:, None])[:, 0]


def _window(encoder: Any, ids: Sequence[int], at: int, config: CompressionConfig, pad_token_id: int) -> torch.Tensor:
    core = list(ids[at : at + config.window])
    left = list(ids[max(0, at - config.overlap) : at])
    right = (
        list(ids[at + config.window : at + config.window + config.overlap]) if config.mask == "bidirectional" else []
    )
    num_chunks = -(-len(core) // config.chunk_size)
    row = left + core + right + ([pad_token_id] * num_chunks if config.pooling == "eos" else [])
    hidden = _hidden_states(encoder, row, causal=config.mask == "causal")
    if config.pooling == "eos":
        return hidden[-num_chunks:]
    vectors = []
    for chunk in range(num_chunks):
        begin = len(left) + chunk * config.chunk_size
        states = hidden[begin : min(begin + config.chunk_size, len(left) + len(core))]
        if config.pooling == "mean":
            vectors.append(states.mean(dim=0))
        elif config.pooling == "rotary":
            turned = torch.stack([_turned(state, place) for place, state in enumerate(states)])
            vectors.append(torch.cat([states.mean(dim=0), turned.mean(dim=0)]))
        else:
            missing = torch.zeros(config.chunk_size - len(states), states.shape[1])
            vectors.append(torch.cat([states, missing]).flatten())
    return torch.stack(vectors)


def _turned(state: torch.Tensor, place: int) -> torch.Tensor:
    """A state turned by its place, as complex numbers: dimension j with dimension j + half."""
    half = len(state) // 2
    angles = torch.tensor([place * math.pi * (j + 0.5) / half for j in range(half)])
    turned = torch.complex(state[:half], state[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag])


def _hidden_states(encoder: Any, row: list[int], *, causal: bool) -> torch.Tensor:
    assert encoder.config._attn_implementation == "eager"
    length = len(row)
    mask = torch.zeros(1, 1, length, length)
    if causal:
        for token in range(length):
            mask[0, 0, token, token + 1 :] = torch.finfo(torch.float32).min
    out = encoder(input_ids=torch.tensor([row]), attention_mask=mask, position_ids=torch.arange(length)[None])
    return out.last_hidden_state[0]


def _tokens(encoder: Any, ids: Sequence[int], at: int, config: CompressionConfig) -> torch.Tensor:
    """For each chunk of a window the mean of its tokens' embeddings, and the mean of these turned by their places."""
    core, vectors = ids[at : at + config.window], []
    table = encoder.get_input_embeddings().weight
    for begin in range(0, len(core), config.chunk_size):
        states = torch.stack([table[token] for token in core[begin : begin + config.chunk_size]])
        turned = torch.stack([_turned(state, place) for place, state in enumerate(states)])
        vectors.append(torch.cat([states.mean(dim=0), turned.mean(dim=0)]))
    return torch.stack(vectors)


def _normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * weight


def _mlp(state: dict[str, torch.Tensor], rows: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    middle = _normed(rows, state["norm.weight"]) @ state["fc1.weight"].T + state["fc1.bias"]
    if tokens is not None:
        middle = middle + _normed(tokens, state["token_norm.weight"]) @ state["token_fc.weight"].T
    middle = middle * 0.5 * (1 + torch.erf(middle / 2**0.5))
    return middle @ state["fc2.weight"].T + state["fc2.bias"]


def _attention_layers(state: dict[str, torch.Tensor], layer_config: Any, rows: torch.Tensor) -> torch.Tensor:
    """Stock Qwen3 layers over one span: nothing masked, positions from 0."""
    num_layers = len({key.split(".")[1] for key in state if key.startswith("attention_layers.")})
    heads = layer_config.num_attention_heads
    config = Qwen3Config(
        hidden_size=layer_config.hidden_size,
        intermediate_size=layer_config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(layer_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(layer_config, "head_dim", None) or layer_config.hidden_size // heads,
        hidden_act=layer_config.hidden_act,
        rms_norm_eps=getattr(layer_config, "rms_norm_eps", 1e-6),
        num_hidden_layers=num_layers,
        attn_implementation="eager",
    )
    positions = torch.arange(len(rows))[None]
    hidden = rows[None]
    rotary = Qwen3RotaryEmbedding(config)(hidden, positions)
    for index in range(num_layers):
        prefix = f"attention_layers.{index}.decoder_layer."
        layer = Qwen3DecoderLayer(config, layer_idx=index).eval()
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        mask = torch.zeros(1, 1, len(rows), len(rows))
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden[0]
