"""The pair that a run trains: the toy, the embedded default, a checkpoint, or two models put together anew.

model, tokenizers = starting_pair(config.pair, seed=0)
"""

from __future__ import annotations

import torch
from transformers import AutoModel, AutoModelForCausalLM

from utils.checkpoint.default.assemble import assemble_default_checkpoint
from utils.checkpoint.load import check_report, resize_table
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.pair import end_tokens, load_pair
from utils.checkpoint.settings import AS_STORED
from utils.model.adapter import Adapter
from utils.model.code_chunker import CodeChunker
from utils.model.code_llava_model import CodeLLaVAModel, MemoryEncoder
from utils.model.config import CompressionConfig
from utils.model.markers import MARKERS
from utils.model.prompt import PromptTokenizers
from utils.pretrained import fetch, read_model, read_tokenizer, without_progress_bars
from utils.training.config import PairConfig
from utils.training.toy import build_toy_pair

DEFAULT = "default"
TOY = "toy"


def starting_pair(config: PairConfig, seed: int = 0) -> tuple[CodeLLaVAModel, PromptTokenizers]:
    """Load or build the pair on the CPU, weights as stored, before any training of this run.

    Args:
        config: Which pair.
        seed: Of weights that are drawn: the toy's, a new pair's adapter.

    Raises:
        CheckpointError: A checkpoint or model is missing or inconsistent.
        ConfigError: The models do not fit together.
    """
    model, tokenizers = _as_configured(config, seed)
    if config.token_columns and not model.config.token_columns:
        model.memory_encoder.add_token_columns()
    return model, tokenizers


def _as_configured(config: PairConfig, seed: int) -> tuple[CodeLLaVAModel, PromptTokenizers]:
    if config.checkpoint == TOY:
        return build_toy_pair(seed)
    if config.checkpoint:
        root = assemble_default_checkpoint(trained=False) if config.checkpoint == DEFAULT else config.checkpoint
        return load_pair(find_checkpoint(root), AS_STORED)
    return _new_pair(config, seed)


def _new_pair(config: PairConfig, seed: int) -> tuple[CodeLLaVAModel, PromptTokenizers]:
    models, tokenizers = [], []
    for kind, name in ((AutoModel, config.encoder), (AutoModelForCausalLM, config.decoder)):
        folder = fetch(name)
        with without_progress_bars():
            model, report = read_model(kind, folder)
        check_report(report, folder)
        models.append(model)
        tokenizers.append(read_tokenizer(folder))
    (encoder, decoder), (encoder_tokenizer, decoder_tokenizer) = models, tokenizers
    decoder_tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    resize_table(decoder, len(decoder_tokenizer))
    compression = CompressionConfig(chunk_size=1, window=config.window, pooling=config.pooling)
    chunker = CodeChunker(encoder, compression, pad_token_id=encoder_tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = int(decoder.config.hidden_size)
        adapter = Adapter(chunker.width, width, config=compression, middle_width=config.adapter_width)
    memory_encoder = MemoryEncoder(chunker, adapter.to(encoder.dtype))
    ends = end_tokens(decoder, decoder_tokenizer)
    model = CodeLLaVAModel(memory_encoder, decoder, eos_token_ids=ends, pad_token_id=ends[0] if ends else 0)
    return model, PromptTokenizers(decoder=decoder_tokenizer, encoder=encoder_tokenizer)
