"""A whole checkpoint in memory: the pair of encoder and decoder as one model, and both tokenizers."""

from __future__ import annotations

from typing import Any

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import check_vocabulary, load_decoder, load_memory_encoder, load_tokenizers
from utils.checkpoint.settings import ON_CPU, EncoderSettings
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.markers import MARKERS
from utils.model.prompt import PromptTokenizers


def load_pair(files: CheckpointFiles, settings: EncoderSettings = ON_CPU) -> tuple[CodeLLaVAModel, PromptTokenizers]:
    """Load encoder, adapter and decoder as one model, and both tokenizers.

    Args:
        files: The checkpoint.
        settings: Where and how both language models run.

    Returns:
        The model in eval mode, and the tokenizers.

    Raises:
        CheckpointError: A part of it cannot be used, or the parts do not fit together.
        ConfigError: The device is not there, or the dtype unknown.
    """
    tokenizers = load_tokenizers(files)
    encoder = load_memory_encoder(files, settings, tokenizer=tokenizers.encoder)
    decoder = load_decoder(files, settings)
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


def framing_tokens(decoder: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that no answer shows: of ends, beginnings and the like, of the markers, and what the chat template writes.

    A model may say other special tokens, such as `<filename>`: they are part of its text.
    """
    return tokenizer_framing(tokenizer).union(end_tokens(decoder, tokenizer))


def tokenizer_framing(tokenizer: Any) -> frozenset[int]:
    """`framing_tokens` as far as the tokenizer alone tells."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    framing = {i for i, text in special.items() if text in template or text in MARKERS}
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    named = {i for role in roles if (i := getattr(tokenizer, f"{role}_token_id", None)) is not None}
    return frozenset(framing | named)
