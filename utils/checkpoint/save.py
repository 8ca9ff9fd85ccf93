"""Write checkpoints in the native layout or LCLM's; a folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from utils.checkpoint.layout import CODE_LLAVA, LAYOUTS, LCLM, Layout
from utils.checkpoint.weight_files import writing
from utils.errors import CheckpointError
from utils.files import atomic_folder, write_json
from utils.model.adapter import Adapter
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.config import CONFIG_FILE, CompressionConfig
from utils.model.prompt import PromptTokenizers

_HOLDS = (CONFIG_FILE, *(name for layout in LAYOUTS for name in layout.folders))


def save_checkpoint(
    path: str | Path, model: CodeLLaVAModel, tokenizers: PromptTokenizers, layout: Layout = CODE_LLAVA
) -> None:
    """Write a model with both tokenizers as one checkpoint folder.

    Args:
        path: The folder; an existing checkpoint is replaced once the new one is whole.
        model: What to save, in its own dtype.
        tokenizers: Decoder and encoder tokenizer.
        layout: `CODE_LLAVA` or `LCLM`.

    Raises:
        CheckpointError: The layout cannot hold this adapter.
        OSError: There is a folder that holds more than a checkpoint.
    """
    with atomic_folder(path, holds=_HOLDS) as folder, writing(path):
        save_adapter(folder, model.memory_encoder.adapter, model.config, layout)
        for name, part, tokenizer in (
            (layout.decoder, model.decoder, tokenizers.decoder),
            (layout.encoder, model.code_chunker.encoder, tokenizers.encoder),
        ):
            _save_pretrained(part, folder / name)
            tokenizer.save_pretrained(folder / name)


def save_adapter(folder: Path, adapter: Adapter, config: CompressionConfig, layout: Layout = CODE_LLAVA) -> None:
    """Write the adapter's file(s) and `model_config.json` of a layout into a folder.

    Raises:
        CheckpointError: Attention layers in the Code-LLaVA layout, which has no names for them.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    if layout is CODE_LLAVA and adapter.has_attention:
        raise CheckpointError(f"the {layout.name} layout cannot hold a {adapter.kind} adapter: save it as {LCLM.name}")
    for name, renamed in layout.adapter_files(config).items():
        tensors = {disk: state[ours] for disk, ours in renamed.items()} if renamed else state
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            save_file(tensors, path)
    write_json(folder / CONFIG_FILE, config.to_json())


def _save_pretrained(model: Any, folder: Path) -> None:
    # Our packed attention is a way to run the model, not a property of its weights.
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            model.save_pretrained(folder)
    finally:
        model.set_attn_implementation(implementation)
