"""FSDP2: each process keeps a part of every tensor and gathers a layer's when the layer runs.

    if wants_sharding():                      # accelerate launch with an FSDP configuration
        shard(pair, accelerator.device)       # once; parameters become DTensors under their old names
    full(parameter)                           # the whole tensor again; every process must take part
    part_of(tensor, parameter)                # the part of a whole tensor that this process keeps

Source: torch's `fully_shard`, and Zhao et al., "PyTorch FSDP", arXiv 2304.11277.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.errors import ConfigError
from utils.training.config import TrainConfig
from utils.training.losses import TrainedPair

# More than any row holds: the encoder then runs once a row.
_ONE_PASS = 1 << 40


def wants_sharding() -> bool:
    """Whether this process was launched with an FSDP configuration.

    accelerate itself takes no notice of one on CPUs, hence the look at what its launcher sets.

    Raises:
        ConfigError: The configuration asks for DeepSpeed.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the launch configuration asks for DeepSpeed, whose engine takes optimiser and backward pass from the "
            "trainer: use utils/training/configs/accelerate_fsdp2.yaml, which shards the same things"
        )
    return _is_set("ACCELERATE_USE_FSDP")


def check_shares(config: TrainConfig, num_processes: int) -> None:
    """Raise `ConfigError` unless the processes can share each stage's rows evenly."""
    for number, stage in enumerate(config.stages):
        if stage.rows % num_processes:
            raise ConfigError(
                f"stages[{number}].rows is {stage.rows}, which {num_processes} processes cannot share evenly: choose a "
                f"multiple of {num_processes}"
            )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def shard(pair: TrainedPair, device: torch.device) -> None:
    """Spread a pair over the processes, layer by layer, in place; it moves to `device`.

    Everything outside the layers – tables, head, norms, adapter, marker rows – is one unit, gathered for a whole pass.

    Raises:
        ConfigError: The launch configuration asks for FSDP1 or offloading, or a model cannot be cut into equal passes.
    """
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError("the launch configuration asks for FSDP1: set fsdp_version: 2 in its fsdp_config")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("the launch configuration offloads to the CPU, which is not supported: drop that line of it")
    chunker = pair.memory_encoder.chunker
    if not chunker.packed:
        name = type(chunker.encoder).__name__
        raise ConfigError(f"{name} cannot run packed rows, which sharding needs: train without an FSDP configuration")
    # Gathering is collective: all processes must run each layer equally often, however long their rows' memories are.
    chunker.batch_tokens = _ONE_PASS
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    for model in (chunker.encoder, pair.decoder):
        for layer in _layers(model):
            fully_shard(layer, **settings)
    fully_shard(pair, **{**settings, "reshard_after_forward": False})


def _layers(model: nn.Module) -> nn.ModuleList:
    """The transformer layers: the outermost list of modules."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise ConfigError(f"{type(model).__name__} has no list of layers to shard: train without an FSDP configuration")


@contextlib.contextmanager
def without_sync(accelerator: Accelerator, wrapped: Any) -> Iterator[None]:
    """Keep gradients to this process, to be summed over the processes after a later row."""
    if not isinstance(wrapped, FSDPModule):
        with accelerator.no_sync(wrapped):
            yield
        return
    wrapped.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        wrapped.set_requires_gradient_sync(True)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a whole tensor, on the parameter's device and sharded as the parameter is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    # Every process has read the same file: nothing needs to be sent.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
