"""A tiny random model pair over single characters: trains in minutes on a CPU, and tests run on it.

pair = build_toy_pair(seed=0)       # a two-layer encoder, a three-layer decoder, 128 wide
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from utils.model.adapter import Adapter
from utils.model.code_chunker import CodeChunker
from utils.model.code_llava_model import CodeLLaVAModel, MemoryEncoder
from utils.model.config import CompressionConfig
from utils.model.markers import MARKERS
from utils.model.prompt import PromptTokenizers

END = "<|end|>"
UNKNOWN = "<|unknown|>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] }}"
    "{{ ('<|end|>' if message['role'] == 'assistant' else '') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
CONFIG = CompressionConfig(chunk_size=2, window=64, pooling="mean")


def build_toy_pair(
    seed: int = 0, *, width: int = 128, encoder_layers: int = 2, decoder_layers: int = 3
) -> tuple[CodeLLaVAModel, PromptTokenizers]:
    """Make the pair; the same seed gives the same weights, and torch's own generator is left as it was."""
    tokenizers = PromptTokenizers(decoder=toy_tokenizer(), encoder=toy_tokenizer(markers=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = LlamaModel(_llama_config(width, encoder_layers, len(tokenizers.encoder)))
        decoder = LlamaForCausalLM(_llama_config(width, decoder_layers, len(tokenizers.decoder)))
        adapter = Adapter(width, width, config=CONFIG, middle_width=2 * width)
    end = tokenizers.decoder.eos_token_id
    decoder.generation_config.eos_token_id = decoder.generation_config.pad_token_id = end
    memory_encoder = MemoryEncoder(CodeChunker(encoder, CONFIG, pad_token_id=end), adapter)
    return CodeLLaVAModel(memory_encoder, decoder, eos_token_ids=[end], pad_token_id=end), tokenizers


def toy_tokenizer(markers: bool = True) -> Any:
    """One token a printable ASCII character."""
    vocabulary = {token: number for number, token in enumerate([END, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    if markers:
        fast.add_special_tokens({"additional_special_tokens": list(MARKERS)})
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _llama_config(width: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        # A padding row would be zero and never learn; here the end token, which pads, must be predicted too.
        pad_token_id=None,
    )
