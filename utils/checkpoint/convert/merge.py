"""A trainer's state into the pair it was trained from: every tensor has a place, every parameter its tensor.

counts = put_state(model, "runs/pair/checkpoint_3", marker_ids, StateOptions(lora_alpha={"decoder": 64}))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.checkpoint.convert.names import ENCODER, pair_names
from utils.checkpoint.convert.states import find_state, read_state
from utils.checkpoint.trained_state import MARKER_DELTA, merge_trained_state
from utils.errors import CheckpointError
from utils.model.code_llava_model import CodeLLaVAModel

# How many names an error shows.
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOptions:
    """How a trainer's state is put into its base.

    Attributes:
        format: One of `utils.checkpoint.convert.states.FORMATS`, or "auto".
        lora_alpha: LoRA alpha of each part ("encoder", "decoder") that has LoRA weights; the state does not say it.
        frozen_from_base: Leave parameters that the state lacks as they are, where otherwise they are an error.
    """

    format: str = "auto"
    lora_alpha: Mapping[str, float] = field(default_factory=dict)
    frozen_from_base: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCounts:
    """What was put where.

    Attributes:
        source: The file or folder that was read.
        format: One of `utils.checkpoint.convert.states.FORMATS`.
        tensors: Tensors read.
        lora_layers: Layers that a LoRA pair was merged into.
        from_base: Parameters that the state lacks.
    """

    source: str
    format: str
    tensors: int
    lora_layers: int
    from_base: int


def put_state(
    model: CodeLLaVAModel, source: str | Path, marker_ids: Sequence[int], options: StateOptions | None = None
) -> StateCounts:
    """Read a trainer's state and write it into a pair, in the pair's own dtype; LoRA is merged.

    Args:
        model: What the training started from; changed in place.
        source: What `find_state` takes.
        marker_ids: Rows of the decoder's table that a state of our own trainer adds to.
        options: How to read it.

    Raises:
        CheckpointError: Tensors are left over, missing or of another shape, or the LoRA scale is not known.
    """
    options = options or StateOptions()
    found = find_state(source, options.format)
    raw = read_state(found)
    names = pair_names(raw)
    state = {name: raw[original] for original, name in names.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scales = _lora_scales(state, options.lora_alpha, found.path)
    places = {*parameters, MARKER_DELTA, *(f"{layer}.lora_{ab}.default.weight" for layer in scales for ab in "AB")}
    # Buffers are computed from the configuration; trainers that store them are not wrong.
    buffers = {name for name, _ in model.named_buffers()}
    left_over = [original for original, name in names.items() if name not in places | buffers]
    _refuse("have no place in the pair", left_over, found.path)
    changed_by_lora = [f"{layer}.weight" for layer in scales]
    lost = [name for name in changed_by_lora if name not in parameters]
    _refuse("that LoRA weights change are not in the pair", lost, found.path)
    tied = [name for name in changed_by_lora if sum(p is parameters[name] for p in parameters.values()) > 1]
    advice = "; untie them in the base's config.json (tie_word_embeddings)"
    _refuse("that LoRA weights change are tied to others, which would change too", tied, found.path, advice)
    missing = _missing(parameters, state)
    if not options.frozen_from_base:
        advice = "; pass --frozen-from-base if they were left out because they did not learn"
        _refuse("of the pair are missing", missing, found.path, advice)
    changed = {name: tensor for name, tensor in state.items() if name in places}
    merge_trained_state(model, changed, {f"{layer}.": scale for layer, scale in scales.items()}, marker_ids)
    return StateCounts(
        source=str(found.path),
        format=found.format,
        tensors=len(raw),
        lora_layers=len(scales),
        from_base=len(missing),
    )


def _lora_scales(state: Mapping[str, torch.Tensor], alphas: Mapping[str, float], path: Path) -> dict[str, float]:
    """Layer → what its B·A is multiplied with: alpha / rank."""
    scales: dict[str, float] = {}
    for name, tensor in state.items():
        layer, found, _ = name.partition(".lora_A.")
        if not found:
            continue
        part = "encoder" if name.startswith(ENCODER) else "decoder"
        if part not in alphas:
            raise CheckpointError(
                f"{path} holds LoRA weights of the {part} ({name}) and does not say their scale: pass "
                f"--{part}-lora-alpha with the lora_alpha that it was trained with"
            )
        if f"{layer}.lora_B.default.weight" not in state:
            raise CheckpointError(f"{path}: {name} has no lora_B beside it: the state is not whole")
        scales[layer] = alphas[part] / tensor.shape[0]
    return scales


def _missing(parameters: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Parameters that the state has under none of their names (tied ones have several)."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    missing = []
    for group in names.values():
        there = [name for name in group if name in state]
        if not there:
            missing.append(group[0])
        for other in there[1:]:
            if not torch.equal(state[there[0]], state[other]):
                raise CheckpointError(
                    f"{there[0]} and {other} are one tensor in the base's configuration, but differ in the state: the "
                    "trained model is not tied; set tie_word_embeddings to false in the base's config.json"
                )
    return missing


def _refuse(what: str, names: Sequence[str], path: Path, advice: str = "") -> None:
    if names:
        first = ", ".join(sorted(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise CheckpointError(f"{path}: {len(names)} tensors {what}: {first}{advice}")
