"""States that two processes really wrote – FSDP2 shards, accelerate's, DeepSpeed's ZeRO – become the pair in memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.processes import run_python
from tests.support.states import Trap, assert_is, parameters
from utils.checkpoint.convert.conversion import convert
from utils.checkpoint.convert.states import find_state, read_state
from utils.checkpoint.save import save_checkpoint
from utils.checkpoint.settings import StateOptions
from utils.errors import CheckpointError
from utils.files import PROJECT_ROOT
from utils.inference.inference import load_model


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pair as a checkpoint."""
    from utils.training.toy import build_toy_pair

    model, tokenizers = build_toy_pair(0)
    folder = tmp_path_factory.mktemp("toy") / "base"
    save_checkpoint(folder, model, tokenizers)
    return folder


RUN = {
    "name": "tiny",
    "pair": {"checkpoint": "toy"},
    "threads": 1,
    "decoder_tuning": {"method": "lora", "rank": 4, "alpha": 8},
    "stages": [
        {
            "preset": "decoder",
            "steps": 1,
            "row_tokens": 128,
            "rows": 2,
            "chunk_sizes": {1: 1, 2: 1, 4: 1},
            "learning_rates": {"adapter": 1e-3, "markers": 1e-3, "encoder": 1e-3, "decoder": 1e-3},
        }
    ],
}
DATA = {"source": "symbols", "chars_per_token": 1, "memory_tokens": [4, 12], "tasks": {"copy_symbols": 30}}


def write_states(folder: Path, *kinds: str) -> Path:
    """Train one step in two processes and save as other trainers do."""
    values = {**RUN, "output": str(folder / "run"), "data": {**DATA, "folder": str(folder / "data")}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tests/support/write_states.py", str(folder / "run.yaml"), str(folder), *kinds]
    paths = os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FSDP_VERSION": "2", "PYTHONPATH": paths}
    done = run_python(*command, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def check_state(folder: Path, kind: str, toy_base: Path, tmp_path: Path) -> None:
    """A folder converts to what the trainer's own export makes of the parameters in memory."""
    from utils.training.config import parse_config
    from utils.training.parts import apply_trained_state
    from utils.training.toy import build_toy_pair

    trained = load_file(folder / f"{kind}.safetensors")
    assert any(".lora_B." in name and tensor.any() for name, tensor in trained.items())
    model, tokenizers = build_toy_pair(0)
    config = parse_config({**RUN, "output": "none", "data": {"folder": "none"}})
    apply_trained_state(model, trained, config, tokenizers.markers)
    options = StateOptions(lora_alpha={"decoder": 8}, frozen_from_base=kind == "zero1")
    if kind == "zero1":
        # DeepSpeed's own function leaves frozen parameters out of stage 1.
        with pytest.raises(CheckpointError, match=r"30 tensors.*--frozen-from-base"):
            convert(folder / kind, tmp_path / kind, base=toy_base, options=StateOptions(lora_alpha={"decoder": 8}))
    result = convert(folder / kind, tmp_path / kind, base=toy_base, options=options)
    assert result.lora_layers == 21
    assert result.from_base == (30 if kind == "zero1" else 0)
    assert_is(tmp_path / kind, parameters(model))


@pytest.mark.slow
def test_fsdp_shards_of_two_processes(toy_base: Path, tmp_path: Path) -> None:
    folder = write_states(tmp_path, "dcp", "accelerate")
    for kind in ("dcp", "accelerate"):
        check_state(folder, kind, toy_base, tmp_path / "new")
    # So does what the trainer keeps in its own checkpoints, which is the trained parameters only.
    options = StateOptions(lora_alpha={"decoder": 8}, frozen_from_base=True)
    convert(folder / "dcp.safetensors", tmp_path / "own", base=toy_base, options=options)
    assert_is(tmp_path / "own", parameters(load_model(tmp_path / "new" / "dcp", device="cpu")[0]))
    # A half copied folder.
    next((folder / "dcp").glob("__1_*")).unlink()
    with pytest.raises(CheckpointError, match="__1_"):
        read_state(find_state(folder / "dcp"))
    table = folder / "dcp" / ".metadata"
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged, half copied"):
        read_state(find_state(folder / "dcp"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed")
def test_zero_of_two_processes(toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_states(tmp_path, "zero1", "zero2", "zero3")
    for kind in ("zero1", "zero2", "zero3"):
        check_state(folder, kind, toy_base, tmp_path / "new")
        shutil.rmtree(tmp_path / "new" / kind)
    next((folder / "zero2" / "global_step1").glob("*pp_rank_1*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"no whole ZeRO checkpoint .*: Expected 2"):
        read_state(find_state(folder / "zero2"))
    # DeepSpeed would unpickle anything; here it does not.
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"module": Trap()}, folder / "zero3" / "global_step1" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"ZeRO.*Weights only"):
        read_state(find_state(folder / "zero3"))
    assert not (tmp_path / "sprung").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
