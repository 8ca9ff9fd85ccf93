"""The parts of a pair that can learn: which learn, how fast, and how to keep them.

    add_lora(pair, config)                                # once: LoRA where the configuration says so
    groups = parameter_groups(pair, config, stage)        # per stage: freezes the rest, gives the optimiser's groups
    named = trained_names(pair, config)                   # what training can change, and nothing else
    start_from(part, named, config)                       # values that an earlier run packed
    apply_trained_state(model, state, config, markers)    # into a pair as it was before: LoRA merged, marker rows added

The unpacker is no part of the pair: it learns beside it and is left behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.checkpoint.default.trained_part import TrainedPart
from utils.checkpoint.trained_state import merge_trained_state
from utils.errors import CheckpointError, ConfigError
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.markers import MarkerIds
from utils.training import lora
from utils.training.config import UNPACKER, StageConfig, TrainConfig, TuningConfig
from utils.training.losses import TrainedPair

_LORA = re.compile(r"\.lora_[AB]\.")


def _tunings(config: TrainConfig) -> dict[str, tuple[str, TuningConfig]]:
    """Part → the prefix of its parameters' names, and how it learns; for the two language models."""
    return {
        "encoder": ("memory_encoder.chunker.encoder.", config.encoder_tuning),
        "decoder": ("decoder.", config.decoder_tuning),
    }


def add_lora(pair: TrainedPair, config: TrainConfig) -> None:
    """Put LoRA weights beside all linear layers of the models that learn that way; at first they change nothing."""
    for prefix, tuning in _tunings(config).values():
        if tuning.method == "lora":
            lora.add_lora(pair.get_submodule(prefix[:-1]), tuning.rank, tuning.alpha)


def learnable(pair: TrainedPair, config: TrainConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Part → the named parameters that learn when the part does.

    A model that learns by LoRA keeps everything else frozen; one that learns fully keeps its embedding table (and a
    head tied to it) frozen, which the other parts are aligned with.
    """
    named = list(pair.named_parameters())
    prefixes = {"adapter": "memory_encoder.adapter.", "markers": "marker_rows.", UNPACKER: f"{UNPACKER}."}
    parts = {part: [(n, p) for n, p in named if n.startswith(prefix)] for part, prefix in prefixes.items()}
    for part, (prefix, tuning) in _tunings(config).items():
        model: Any = pair.get_submodule(prefix[:-1])
        table = model.get_input_embeddings().weight
        is_lora = tuning.method == "lora"
        parts[part] = [
            (n, p) for n, p in named if n.startswith(prefix) and (_LORA.search(n) if is_lora else p is not table)
        ]
    return parts


def trained_names(pair: TrainedPair, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Every parameter that some stage of the run trains, by name."""
    parts = learnable(pair, config)
    return {name: parameter for part in sorted(config.trained_parts) for name, parameter in parts[part]}


def start_from(part: TrainedPart, trained: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
    """Put an earlier run's trained part into the parameters of a new one; those that it does not have stay as they are.

    Raises:
        ConfigError: The run has no place for a tensor of the part, or scales its LoRA otherwise.
    """
    scales, state = lora_scales(config), part.tensors()
    for prefix, scale in part.lora_scales.items():
        if scales.get(prefix) != scale and any(_LORA.search(n) and n.startswith(prefix) for n in state):
            raise ConfigError(
                f"pair.trained: {part.folder} has LoRA of scale (alpha / rank) {scale} under {prefix}, the "
                f"configuration {scales.get(prefix, 'none')}: give the tuning of the run that packed it"
            )
    for name, tensor in state.items():
        if name not in trained or trained[name].shape != tensor.shape:
            found = list(trained[name].shape) if name in trained else "nothing that learns"
            raise ConfigError(
                f"pair.trained: {part.folder} has {name} of shape {list(tensor.shape)}, the run has {found}: give the "
                "pair and tuning of the run that packed it, and let a stage name every part that it trained (a "
                "learning rate of 0 keeps a part as it is)"
            )
        with torch.no_grad():
            trained[name].copy_(tensor)


def parameter_groups(pair: TrainedPair, config: TrainConfig, stage: StageConfig) -> list[dict[str, Any]]:
    """Freeze what the stage does not train, and return the optimiser's groups for what it does.

    Weight decay acts on matrices only. Each group carries its peak learning rate under `peak`.
    """
    for parameter in pair.parameters():
        parameter.requires_grad_(False)
    groups = []
    for part, parameters in learnable(pair, config).items():
        # At a rate of 0 a part belongs to the run, but needs no gradient.
        if part not in stage.learning_rates or not stage.learning_rates[part]:
            continue
        rate = stage.learning_rates[part]
        for decayed in (True, False):
            chosen = [p for _, p in parameters if (p.ndim >= 2 and part != "markers") == decayed]
            for parameter in chosen:
                parameter.requires_grad_(True)
            if chosen:
                decay = stage.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": decay, "part": part})
    return groups


def set_precision(pair: TrainedPair, config: TrainConfig) -> None:
    """Store what learns in float32 and, under bfloat16, everything else in bfloat16."""
    frozen = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    trained = {id(parameter) for parameter in trained_names(pair, config).values()}
    for parameter in pair.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in trained else frozen)


def checkpoint_activations(pair: TrainedPair) -> None:
    """Keep inputs of layers only; the method's name changed within transformers 5."""
    for model in (pair.decoder, pair.memory_encoder.chunker.encoder):
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


def lora_scales(config: TrainConfig) -> dict[str, float]:
    """Prefix of parameter names → LoRA scale (alpha / rank), for the models that learn by LoRA."""
    return {prefix: t.alpha / t.rank for prefix, t in _tunings(config).values() if t.method == "lora"}


def apply_trained_state(
    model: CodeLLaVAModel, state: Mapping[str, torch.Tensor], config: TrainConfig, markers: MarkerIds
) -> None:
    """Put a run's trained state into its pair as it was before training.

    Raises:
        CheckpointError: A tensor has no place in the pair.
    """
    unused = merge_trained_state(model, state, lora_scales(config), (markers.start, markers.end))
    if unused:
        raise CheckpointError(f"the trained state has {sorted(unused)[0]}, which the pair has no place for")
