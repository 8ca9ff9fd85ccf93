"""The trained part: small files that, merged into the pair as it was, give the exported pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.errors import CheckpointError
from utils.inference.inference import load_model
from utils.inference.saving import save_checkpoint
from utils.inference.trained_part import TrainedPart, merge_into_checkpoint
from utils.training import pack
from utils.training.config import TrainConfig
from utils.training.export import export_pair
from utils.training.loop import Trainer
from utils.training.pairs import load_pair

Config = Callable[..., TrainConfig]


def test_packed_and_merged_is_the_exported_pair(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    trainer = Trainer(config, device="cpu")
    trainer.run()
    with torch.no_grad():
        for parameter in trainer.trained.values():
            # Values that bfloat16 holds exactly, large enough to matter.
            parameter.add_(0.01 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    trainer._save(None)
    monkeypatch.setattr(pack, "MAX_FILE_BYTES", 200_000)
    manifest = pack.pack_run(config, tmp_path / "trained", card="# card\n")
    assert len(manifest["files"]) > 1
    assert max(path.stat().st_size for path in (tmp_path / "trained").iterdir()) <= 200_000

    folder = tmp_path / "assembled"
    save_checkpoint(folder, *load_pair(config.pair, config.seed))
    merge_into_checkpoint(folder, TrainedPart.open(tmp_path / "trained"))
    assert (folder / "README.md").read_text() == "# card\n"
    merged, _, _ = load_model(folder, device="cpu")
    exported, _, _ = load_model(export_pair(config), device="cpu")
    assert merged.config == exported.config
    expected = exported.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_damaged_part_is_refused(run_config: Config, tmp_path: Path) -> None:
    config = run_config()
    Trainer(config, device="cpu").run(last_stage=0)
    pack.pack_run(config, tmp_path / "trained")
    (tmp_path / "trained" / "part-00.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        TrainedPart.open(tmp_path / "trained")


def test_a_part_too_large_for_a_repository_is_refused(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    Trainer(config, device="cpu").run(last_stage=0)
    monkeypatch.setattr(pack, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(CheckpointError, match="smaller LoRA rank"):
        pack.pack_run(config, tmp_path / "trained")
