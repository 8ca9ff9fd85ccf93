"""Train one step in each process and save as other trainers do: FSDP2 shards, accelerate's folder, DeepSpeed's ZeRO.

    python -m torch.distributed.run --nproc-per-node 2 tests/support/write_states.py CONFIG.yaml OUTPUT KIND…

Each kind (dcp, accelerate, zero1, zero2, zero3) writes `OUTPUT/KIND/` and, beside it, `KIND.safetensors`: the trained
parameters as they are in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model, save_fsdp_optimizer
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from utils.training.config import load_config
from utils.training.loop import Trainer
from utils.training.parts import parameter_groups
from utils.training.sharding import full, shard


def write(config_path: str, folder: Path, kind: str) -> None:
    """One kind; every process calls it."""
    torch.manual_seed(0)
    trainer = Trainer(load_config(config_path), device="cpu")
    stage = trainer.config.stages[-1]
    row = trainer.step_rows(trainer.packer(len(trainer.config.stages) - 1), stage)[trainer.accelerator.process_index]
    groups = parameter_groups(trainer.pair, trainer.config, stage)
    learning = {id(p) for group in groups for p in group["params"]}
    names = {name for name, p in trainer.pair.named_parameters() if id(p) in learning}
    if kind.startswith("zero"):
        trained = _deepspeed(trainer, groups, row, folder, int(kind[-1]), names)
    else:
        trained = _fsdp(trainer, row, folder, kind, names)
    if trainer.accelerator.is_main_process:
        save_file(trained, folder.with_suffix(".safetensors"))
    trainer.accelerator.wait_for_everyone()


def _fsdp(trainer: Trainer, row: Any, folder: Path, kind: str, names: set[str]) -> dict[str, torch.Tensor]:
    pair = trainer.pair
    shard(pair, torch.device("cpu"))
    optimizer = torch.optim.AdamW([p for p in pair.parameters() if p.requires_grad], lr=1e-2)
    pair(row).backward()
    optimizer.step()
    if kind == "accelerate":
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
        save_fsdp_model(plugin, trainer.accelerator, pair, folder)
        save_fsdp_optimizer(plugin, trainer.accelerator, optimizer, pair, folder)
    else:
        state = {"model": get_model_state_dict(pair), "optimizer": get_optimizer_state_dict(pair, optimizer), "step": 1}
        dcp.save(state, checkpoint_id=folder)
    return {name: full(p.detach()).clone() for name, p in pair.named_parameters() if name in names}


def _deepspeed(
    trainer: Trainer, groups: list[dict[str, Any]], row: Any, folder: Path, stage: int, names: set[str]
) -> dict[str, torch.Tensor]:
    import deepspeed

    # ZeRO-3 gathers a layer at a time, so its passes must be equal on all processes, as FSDP's must.
    trainer.pair.memory_encoder.chunker.batch_tokens = 1 << 40
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=trainer.pair, optimizer=optimizer, config=config)
    engine.backward(engine(row))
    engine.step()
    engine.save_checkpoint(str(folder), tag="global_step1")
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters() if name in names}


if __name__ == "__main__":
    for name in sys.argv[3:]:
        write(sys.argv[1], Path(sys.argv[2]) / name, name)
    torch.distributed.destroy_process_group()
