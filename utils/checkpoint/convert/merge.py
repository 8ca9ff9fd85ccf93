"""A trainer's state into the pair it was trained from: every tensor has a place, every parameter its tensor.

counts = put_state(model, find_state("runs/pair/checkpoint_3"), marker_ids, StateOptions(lora_alpha={"decoder": 64}))
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_tied_parameters

from utils.checkpoint.convert.names import ENCODER, pair_names
from utils.checkpoint.convert.states import StateFiles, read_state
from utils.checkpoint.settings import StateOptions
from utils.checkpoint.trained_state import MARKER_DELTA, merge_trained_state
from utils.errors import CheckpointError
from utils.model.code_llava_model import CodeLLaVAModel

# How many names an error shows.
_SHOWN = 3
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def put_state(
    model: CodeLLaVAModel, found: StateFiles, marker_ids: Sequence[int], options: StateOptions
) -> dict[str, Any]:
    """Read a trainer's state and write it into a pair, in the pair's own dtype; LoRA is merged.

    Args:
        model: What the training started from; changed in place.
        found: Where the state is.
        marker_ids: Rows of the decoder's table that a state of our own trainer adds to.
        options: How to read it.

    Returns:
        What a `Conversion` counts: tensors read, layers with LoRA, and parameters that the state lacks.

    Raises:
        CheckpointError: Tensors are left over, missing or of another shape, or the LoRA scale is not known.
    """
    raw = read_state(found)
    names = pair_names(raw)
    state = {name: raw[original] for original, name in names.items()}
    scales = _lora_scales(state, options.lora_alpha, found.path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {*parameters, MARKER_DELTA}
    places |= {layer + half for layer in scales if f"{layer}.weight" in parameters for half in (_LORA_A, _LORA_B)}
    # Buffers are computed from the configuration; trainers that store them are not wrong.
    buffers = {name for name, _ in model.named_buffers()}
    left_over = [original for original, name in names.items() if name not in places | buffers]
    _refuse("have no place in the pair", left_over, found.path)
    tied = find_tied_parameters(model)
    shared = {name for group in tied for name in group} & {f"{layer}.weight" for layer in scales}
    advice = "; untie them in the base's config.json (tie_word_embeddings)"
    _refuse("that LoRA weights change are tied to others, which would change too", shared, found.path, advice)
    _check_tied(tied, state)
    there = {*state, *(name for group in tied if not state.keys().isdisjoint(group) for name in group)}
    missing = [name for name, _ in model.named_parameters() if name not in there]
    if not options.frozen_from_base:
        advice = "; pass --frozen-from-base if they were left out because they did not learn"
        _refuse("of the pair are missing", missing, found.path, advice)
    changed = {name: tensor for name, tensor in state.items() if name in places}
    merge_trained_state(model, changed, {f"{layer}.": scale for layer, scale in scales.items()}, marker_ids)
    return {"tensors": len(raw), "lora_layers": len(scales), "from_base": len(missing)}


def _lora_scales(state: Mapping[str, torch.Tensor], alphas: Mapping[str, float], path: Path) -> dict[str, float]:
    """Layer → what its B·A is multiplied with: alpha / rank."""
    scales: dict[str, float] = {}
    for name in state:
        if not name.endswith(_LORA_A):
            continue
        layer = name.removesuffix(_LORA_A)
        part = "encoder" if name.startswith(ENCODER) else "decoder"
        if part not in alphas:
            raise CheckpointError(
                f"{path} holds LoRA weights of the {part} ({name}) and does not say their scale: pass "
                f"--{part}-lora-alpha with the lora_alpha that it was trained with"
            )
        if layer + _LORA_B not in state:
            raise CheckpointError(f"{path}: {name} has no lora_B beside it: the state is not whole")
        # A lone number has no rank; merging refuses it with its shape.
        scales[layer] = alphas[part] / max([1, *state[name].shape[:1]])
    return scales


def _check_tied(tied: Sequence[Sequence[str]], state: Mapping[str, torch.Tensor]) -> None:
    for group in tied:
        for first, other in itertools.pairwise(name for name in group if name in state):
            if not torch.equal(state[first], state[other]):
                raise CheckpointError(
                    f"{first} and {other} are one tensor in the base's configuration, but differ in the state: the "
                    "trained model is not tied; set tie_word_embeddings to false in the base's config.json"
                )


def _refuse(what: str, names: Collection[str], path: Path, advice: str = "") -> None:
    if names:
        first = ", ".join(sorted(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise CheckpointError(f"{path}: {len(names)} tensors {what}: {first}{advice}")
