"""Tiny random checkpoints: byte-level tokenizers, encoders of three families, decoders of two.

Weights are drawn wide enough that every token, position and mask changes the result well above rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from utils.checkpoint.layout import CODE_LLAVA, Layout
from utils.checkpoint.save import save_checkpoint
from utils.model.adapter import Adapter
from utils.model.code_chunker import CodeChunker
from utils.model.code_llava_model import CodeLLaVAModel, MemoryEncoder
from utils.model.config import CompressionConfig
from utils.model.markers import MARKERS
from utils.model.prompt import PromptTokenizers

ENCODER_WIDTH = 24
DECODER_WIDTH = 32
MAX_POSITIONS = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, markers: bool, template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, plus ChatML's tokens, and the memory markers on request.

    Args:
        markers: Add the three markers, as a decoder's tokenizer has them.
        template: Chat template.
        bos: Put a beginning-of-sequence token in front of every text, as Llama's tokenizers do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [PAD, START, END, *(MARKERS if markers else ())]
    tokenizer.add_special_tokens(specials)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=START if bos else None,
        additional_special_tokens=list(MARKERS) if markers else None,
    )
    wrapped.chat_template = template
    return wrapped


def tokenizers() -> PromptTokenizers:
    """A decoder tokenizer with markers and template, and an encoder tokenizer without."""
    return PromptTokenizers(
        decoder=byte_tokenizer(markers=True, template=CHATML), encoder=byte_tokenizer(markers=False)
    )


def _sizes(width: int, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        **changes,
    }


def make_encoder(family: str = "qwen3", seed: int = 0, attn_implementation: str = "sdpa") -> Any:
    """A random encoder: `qwen3` and `llama` are decoder-only, `bert` is a bidirectional encoder."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": 260, "attn_implementation": attn_implementation}
    if family == "bert":
        return BertModel(BertConfig(**_sizes(ENCODER_WIDTH), **common), add_pooling_layer=False).eval()
    if family == "llama":
        return LlamaModel(LlamaConfig(**_sizes(ENCODER_WIDTH, num_key_value_heads=2), **common)).eval()
    return Qwen3Model(Qwen3Config(**_sizes(ENCODER_WIDTH, num_key_value_heads=2, head_dim=8), **common)).eval()


def make_decoder(family: str = "qwen3", seed: int = 1) -> Any:
    """A random causal language model of family `qwen3` (tied embeddings) or `llama` (untied)."""
    torch.manual_seed(seed)
    sizes = _sizes(DECODER_WIDTH, num_key_value_heads=2, vocab_size=264, bos_token_id=None, eos_token_id=258)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True)).eval()


def make_memory_encoder(
    config: CompressionConfig, family: str = "qwen3", *, seed: int = 2, encoder: Any = None, **chunker: Any
) -> MemoryEncoder:
    """Encoder and adapter with random weights; `chunker` goes to `CodeChunker`."""
    encoder = encoder if encoder is not None else make_encoder(family)
    part = CodeChunker(encoder, config, pad_token_id=256, **chunker)
    layer_config = encoder.config if config.adapter == "attn_mlp" else make_decoder().config
    torch.manual_seed(seed)
    sizes = {"token_width": part.token_width, "layer_config": layer_config}
    adapter = Adapter(part.width, DECODER_WIDTH, config=config, **sizes)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return MemoryEncoder(part, adapter).eval()


def make_model(
    config: CompressionConfig, family: str = "qwen3", decoder_family: str = "qwen3", **chunker: Any
) -> CodeLLaVAModel:
    """A whole random model."""
    marks = tokenizers().decoder
    return CodeLLaVAModel(
        make_memory_encoder(config, family, **chunker),
        make_decoder(decoder_family),
        eos_token_ids=[marks.eos_token_id],
        pad_token_id=marks.pad_token_id,
    ).eval()


def write_checkpoint(
    path: Path,
    config: CompressionConfig,
    *,
    family: str = "qwen3",
    decoder_family: str = "qwen3",
    layout: Layout = CODE_LLAVA,
) -> Path:
    """Write a random model as a checkpoint folder and return the folder."""
    save_checkpoint(path, make_model(config, family, decoder_family), tokenizers(), layout)
    return path
