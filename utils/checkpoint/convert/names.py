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

ENCODER, DECODER, ADAPTER = "memory_encoder.chunker.encoder.", "decoder.", "memory_encoder.adapter."
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)
_OUTER = re.compile(r"^(?:(?:module|model|state_dict)\.)+")
# peft keeps the matrix beside its LoRA pair in `base_layer`, and a module that learns whole beside what it was.
_PEFT = re.compile(r"\.(?:base_layer|modules_to_save\.\w+)(?=\.)")
_LORA = re.compile(r"\.lora_([AB])(?:\.\w+)?\.weight$")
_REPLACED = ".original_module."
# Computed from the configuration; old checkpoints store it all the same.
_COMPUTED = "rotary_emb.inv_freq"

# How the trainers call the parts; the longest fitting prefix counts.
_PARTS = {
    **{name: name for name in (ENCODER, DECODER, ADAPTER, "marker_rows.")},
    **dict.fromkeys(("encoder.embed_model.", "encoder.", "embedder.", "embed_model."), ENCODER),
    **dict.fromkeys(("code_chunker.embed_model.", "code_chunker.encoder."), ENCODER),
    **dict.fromkeys(("llm_model.", "llm."), DECODER),
    "adapter.": ADAPTER,
    **{
        prefix + Path(file).stem + "." + name: ADAPTER + ours
        for file, names in CODE_LLAVA.adapter.items()
        for name, ours in names.items()
        for prefix in ("", "projectors.")
    },
}
_LONGEST_FIRST = sorted(_PARTS, key=len, reverse=True)


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
        if _REPLACED in name or name.endswith(_COMPUTED):
            continue
        name = _LORA.sub(r".lora_\1.default.weight", _PEFT.sub("", name))
        prefix = next((prefix for prefix in _LONGEST_FIRST if name.startswith(prefix)), "")
        name = _PARTS.get(prefix, "") + name.removeprefix(prefix)
        if name in taken:
            raise CheckpointError(
                f"{raw} and {taken[name]} are both {name}: the state holds two models or two LoRA adapters; keep one"
            )
        names[raw], taken[name] = name, raw
    return names
