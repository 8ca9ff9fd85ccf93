"""Names of tensors as trainers write them → as `CodeLLaVAModel` has them. Knows no torch.

    pair_names(["module.llm_model.base_model.model.lm_head.weight"])       # {that: "decoder.lm_head.weight"}

Wrappers (DDP, FSDP, torch.compile, activation checkpointing, accelerate, peft) put their own words into a name; the
published programs and this one call the parts differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from utils.checkpoint.layout import CODE_LLAVA
from utils.errors import CheckpointError

ENCODER, _DECODER, _ADAPTER = "memory_encoder.chunker.encoder.", "decoder.", "memory_encoder.adapter."
# peft keeps the matrix beside its LoRA pair in `base_layer`, and a module that learns whole beside what it was.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|base_model\.model|base_layer|modules_to_save\.\w+)\."
)
_OUTER = re.compile(r"^(?:(?:module|model|state_dict|projectors)\.)+")
_LORA = re.compile(r"\.lora_([AB])(?:\.\w+)?\.weight$")
# What peft has replaced, and what old checkpoints store although the configuration gives it.
_LEFT_OUT = re.compile(r"\.original_module\.|rotary_emb\.inv_freq$")

# How others call the parts; the first fitting prefix counts.
_PARTS = {
    **dict.fromkeys(("encoder.embed_model.", "code_chunker.embed_model.", "code_chunker.encoder."), ENCODER),
    **dict.fromkeys(("encoder.", "embedder.", "embed_model."), ENCODER),
    **dict.fromkeys(("llm_model.", "llm."), _DECODER),
    "adapter.": _ADAPTER,
    **{
        f"{Path(file).stem}.{name}": _ADAPTER + ours
        for file, names in (*CODE_LLAVA.adapter.items(), *CODE_LLAVA.token_columns.items())
        for name, ours in names.items()
    },
}


def pair_names(raw_names: Iterable[str]) -> dict[str, str]:
    """Raw name → the pair's name; names of unknown parts stay as they are without their wrappers.

    Tensors that are computed, or that peft has replaced, are left out.

    Raises:
        CheckpointError: Two tensors come to have one name.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for raw in raw_names:
        name = _OUTER.sub("", _WRAPPERS.sub("", raw))
        if _LEFT_OUT.search(name):
            continue
        name = _LORA.sub(r".lora_\1.default.weight", name)
        prefix = next((prefix for prefix in _PARTS if name.startswith(prefix)), "")
        name = _PARTS.get(prefix, "") + name.removeprefix(prefix)
        if name in taken:
            raise CheckpointError(
                f"{raw} and {taken[name]} are both {name}: the state holds two models or two LoRA adapters; keep one"
            )
        names[raw], taken[name] = name, raw
    return names
