"""What a forward pass costs, reckoned from shapes: floating-point operations and bytes. Nothing is run.

    cost = PairCost.of(memory_encoder, decoder)
    cost.encode_flops([16384])                            # encoder windows and adapter of one span
    cost.decoder.forward_flops([2112], causal=True, logits=1)
    cost.ideal_speedup(full_rows=16448, prompt_rows=2112, span_lengths=[16384])

An operation is a multiplication or an addition: a matrix of w weights costs 2·w a row, and attention costs 4·A a layer
for each pair of a query and a key that it sees, A being heads × head size. Norms, activations, softmax and look-ups are
left out. A causal mask halves the pairs here; torch's `FlopCounterMode` counts the whole square whatever the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from utils.model.adapter import Adapter
from utils.model.code_llava_model import MemoryEncoder
from utils.model.config import CompressionConfig
from utils.model.prompt import num_latents
from utils.model.windows import plan_windows

# Matrix products of attention: two forward; five backward, because fused kernels compute the scores again.
_BACKWARD_ATTENTION = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerCost:
    """The sizes that decide what a transformer costs.

    Sliding windows count as full attention, and every expert of a mixture as if it saw every row: upper bounds.

    Attributes:
        matrix_weights: Weights of all matrices that each row meets, without embedding tables and head.
        head_weights: Weights of the head; 0 without one.
        num_layers: Layers with attention.
        attention_width: A, query heads × head size.
        kv_width: Key/value heads × head size.
        weight_bytes: Bytes of all parameters, tied ones once.
        element_size: Bytes of one activation.
    """

    matrix_weights: int
    head_weights: int = 0
    num_layers: int
    attention_width: int
    kv_width: int
    weight_bytes: int
    element_size: int

    @classmethod
    def of(cls, model: Any) -> TransformerCost:
        """Read the sizes of a Hugging Face model, which may be on the `meta` device, or of an adapter."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        parameters = list(model.parameters())
        if isinstance(model, Adapter):  # a plain MLP has no layers with attention
            layers: list[Any] = list(model.attention_layers) if model.has_attention else []
            num_layers, config = len(layers), layers[0].decoder_layer.self_attn.config if layers else None
        else:
            num_layers, config = model.config.num_hidden_layers, model.config
        heads = config.num_attention_heads if config else 0
        size = (getattr(config, "head_dim", None) or config.hidden_size // heads) if config else 0
        return cls(
            matrix_weights=sum(parameter.numel() for parameter in layer_matrices(model)),
            head_weights=0 if head is None else head.weight.numel(),
            num_layers=num_layers,
            attention_width=heads * size,
            kv_width=(getattr(config, "num_key_value_heads", None) or heads) * size,
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            element_size=parameters[0].element_size(),
        )

    def forward_flops(self, lengths: Iterable[int], *, causal: bool, logits: int = 0) -> int:
        """Operations of one pass over sequences of these lengths, which do not see each other.

        `causal`: whether a row sees only those before it and itself; `logits`: rows that go through the head.
        """
        lengths = list(lengths)
        matrices = 2 * self.matrix_weights * sum(lengths)
        return matrices + self._attention_flops(lengths, causal) + 2 * self.head_weights * logits

    def training_flops(
        self, lengths: Iterable[int], *, causal: bool, learning_weights: int, recompute: bool = False, logits: int = 0
    ) -> int:
        """Operations of a forward and a backward pass through all layers, the head frozen; as `forward_flops`.

        `learning_weights`: weights of matrices that get a gradient of their own; `recompute`: whether activations are
        computed again for the backward pass.
        """
        lengths = list(lengths)
        passes = 2 + recompute
        matrices = 2 * sum(lengths) * (passes * self.matrix_weights + learning_weights)
        attention = (1 + recompute + _BACKWARD_ATTENTION) * self._attention_flops(lengths, causal)
        return matrices + round(attention) + 4 * self.head_weights * logits

    def kv_cache_bytes(self, num_rows: int) -> int:
        """Keys and values that stay for the rows of a prompt."""
        return 2 * self.num_layers * self.kv_width * self.element_size * num_rows

    def _attention_flops(self, lengths: Sequence[int], causal: bool) -> int:
        pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
        return 4 * self.num_layers * self.attention_width * pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCost:
    """What compressing and reading cost with one encoder, adapter and decoder.

    Attributes:
        encoder: Sizes of the encoder.
        adapter: Sizes of the adapter.
        decoder: Sizes of the decoder.
        config: How memory is cut into windows and chunks.
        width: D, columns of a latent.
    """

    encoder: TransformerCost
    adapter: TransformerCost
    decoder: TransformerCost
    config: CompressionConfig
    width: int

    @classmethod
    def of(cls, memory_encoder: MemoryEncoder, decoder: Any) -> PairCost:
        """Read the sizes of a pair."""
        return cls(
            encoder=TransformerCost.of(memory_encoder.chunker.encoder),
            adapter=TransformerCost.of(memory_encoder.adapter),
            decoder=TransformerCost.of(decoder),
            config=memory_encoder.config,
            width=int(decoder.get_input_embeddings().weight.shape[1]),
        )

    def window_lengths(self, span_lengths: Iterable[int], chunk_size: int | None = None) -> list[int]:
        """Rows of each encoder window, with overlap and marker tokens."""
        config = self.config.with_chunk_size(chunk_size)
        windows = [window for length in span_lengths for window in plan_windows(range(length), config)]
        marks = config.pooling == "eos"
        return [window.num_tokens + marks * window.num_latents for window in windows]

    def encode_flops(self, span_lengths: Sequence[int], chunk_size: int | None = None) -> int:
        """Operations that turn spans of so many encoder tokens into latents: encoder windows, then adapter."""
        size = chunk_size or self.config.chunk_size
        latents = [num_latents(length, size) for length in span_lengths]
        windows = self.window_lengths(span_lengths, chunk_size)
        return self.encoder.forward_flops(windows, causal=self.config.causal) + self.adapter.forward_flops(
            latents, causal=False
        )

    def ideal_speedup(
        self,
        *,
        full_rows: int,
        prompt_rows: int,
        span_lengths: Sequence[int],
        chunk_size: int | None = None,
        cached: bool = False,
    ) -> float:
        """S: operations up to the first token with the full text, over those with latents in its place.

        Args:
            full_rows: Rows of the prompt with the text as text, T + q.
            prompt_rows: Rows of the prompt with latents, T/k + q.
            span_lengths: Encoder tokens of each span, T in all.
            chunk_size: Encoder tokens per latent; None for the configuration's.
            cached: Whether the latents are known already.
        """
        full, short = (self.decoder.forward_flops([n], causal=True, logits=1) for n in (full_rows, prompt_rows))
        encoding = 0 if cached else self.encode_flops(span_lengths, chunk_size)
        return full / (encoding + short)

    def wire_bytes(self, num_rows: int) -> int:
        """Characters of latents or other prompt rows as base64, without `torch.save`'s header of a kilobyte or two."""
        return 4 * math.ceil(num_rows * self.width * self.decoder.element_size / 3)


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that every row of a model's input meets: not embedding tables, the head, or an encoder's pooler."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside |= set() if head is None else {id(head.weight)}
    named = {id(p): p for name, p in model.named_parameters() if "pooler." not in name and p.ndim >= 2}
    return [parameter for key, parameter in named.items() if key not in outside]
