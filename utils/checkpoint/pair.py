"""A whole checkpoint in memory: the pair of encoder and decoder as one model, and both tokenizers."""

from __future__ import annotations

from typing import Any

import torch

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import check_vocabulary, load_decoder, load_memory_encoder, load_tokenizers
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.prompt import PromptTokenizers


def load_pair(
    files: CheckpointFiles,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    batch_tokens: int | None = None,
) -> tuple[CodeLLaVAModel, PromptTokenizers]:
    """Load encoder, adapter and decoder as one model, and both tokenizers.

    Args:
        files: The checkpoint.
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        dtype: "float32", "bfloat16", "float16"; None as stored.
        attn_implementation: A transformers name for both models; None: packed encoding, sdpa decoding.
        batch_tokens: Tokens of one encoder pass; None: chosen by device.

    Returns:
        The model in eval mode, and the tokenizers.

    Raises:
        CheckpointError: A part of it cannot be used, or the parts do not fit together.
        ConfigError: The device is not there.
    """
    tokenizers = load_tokenizers(files)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    encoder = load_memory_encoder(files, **settings, batch_tokens=batch_tokens, tokenizer=tokenizers.encoder)
    decoder = load_decoder(files, **settings)
    check_vocabulary(tokenizers.decoder, decoder.get_input_embeddings().weight, files.decoder)
    model = CodeLLaVAModel(
        encoder,
        decoder,
        eos_token_ids=end_tokens(decoder, tokenizers.decoder),
        pad_token_id=tokenizers.decoder.pad_token_id or 0,
    )
    return model.eval(), tokenizers


def end_tokens(decoder: Any, tokenizer: Any) -> list[int]:
    """Ids that end a generation, from the decoder's generation settings and its tokenizer."""
    configured = decoder.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
