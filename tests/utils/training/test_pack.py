"""The trained part: small files that, merged into the pair as it was, give the exported pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.checkpoint.default.build import merge_into_checkpoint
from utils.checkpoint.default.trained_part import TrainedPart
from utils.checkpoint.save import save_checkpoint
from utils.errors import CheckpointError, ConfigError, DatasetError
from utils.files import PROJECT_ROOT, read_jsonl
from utils.inference.inference import load_model
from utils.training import export
from utils.training.config import TrainConfig, load_config
from utils.training.export import export_pair, pack_run
from utils.training.loop import Trainer
from utils.training.pairs import starting_pair
from utils.training.parts import lora_scales

Config = Callable[..., TrainConfig]


@pytest.mark.slow
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
    trainer.save(None)
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 200_000)
    manifest = pack_run(config, tmp_path / "trained", card="# card\n")
    assert len(manifest["files"]) > 1
    assert max(path.stat().st_size for path in (tmp_path / "trained").iterdir()) <= 200_000

    folder = tmp_path / "assembled"
    save_checkpoint(folder, *starting_pair(config.pair, config.seed))
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
    pack_run(config, tmp_path / "trained")
    (tmp_path / "trained" / "part-00.safetensors").write_bytes(b"")
    (tmp_path / "trained" / "notes.txt").touch()
    with pytest.raises(OSError, match=r"notes\.txt"):  # `--target ~`
        pack_run(config, tmp_path / "trained")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        TrainedPart.open(tmp_path / "trained").tensors()


def test_a_part_too_large_for_a_repository_is_refused(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config()
    Trainer(config, device="cpu").run(last_stage=0)
    monkeypatch.setattr(export, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(CheckpointError, match="smaller LoRA rank"):
        pack_run(config, tmp_path / "trained")


def _packed(run_config: Config, folder: Path) -> tuple[TrainConfig, TrainedPart]:
    """A finished run and its part."""
    config = run_config()
    Trainer(config, device="cpu").run()
    pack_run(config, folder)
    return config, TrainedPart.open(folder)


@pytest.mark.slow
def test_a_run_goes_on_from_a_packed_part(run_config: Config, tmp_path: Path) -> None:
    config, part = _packed(run_config, tmp_path / "trained")
    pair = {"checkpoint": "toy", "trained": str(part.folder)}
    further = run_config(pair=pair, output=str(tmp_path / "further"))
    trainer = Trainer(further, device="cpu")
    for name, tensor in part.tensors().items():
        torch.testing.assert_close(trainer.trained[name].bfloat16(), tensor, rtol=0, atol=0)
    assert any(name.startswith("unpacker.") for name in set(trainer.trained) - set(part.tensors()))

    trainer.run(last_stage=0)
    resumed = Trainer(further, device="cpu")
    resumed.run()
    changed = [n for n, t in part.tensors().items() if not torch.equal(resumed.trained[n].bfloat16(), t)]
    assert any("lora_B" in name for name in changed)
    manifest = pack_run(further, tmp_path / "more")
    assert manifest["run"]["global_step"] == config.total_steps
    before = manifest["run"]["started_from"]
    assert before["fingerprint"] == part.fingerprint
    assert before["run"]["global_step"] == config.total_steps
    assert before["run"]["started_from"] is None
    assert before["config"]["pair"]["trained"] is None

    folder = tmp_path / "assembled"
    save_checkpoint(folder, *starting_pair(config.pair, config.seed))
    merge_into_checkpoint(folder, TrainedPart.open(tmp_path / "more"))
    merged, _, _ = load_model(folder, device="cpu")
    exported, _, _ = load_model(export_pair(further), device="cpu")
    expected = exported.state_dict()
    for name, tensor in merged.state_dict().items():
        # The part is stored in bfloat16, the run in float32.
        torch.testing.assert_close(tensor, expected[name], rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_a_part_that_the_run_cannot_go_on_from_is_refused(run_config: Config, tmp_path: Path) -> None:
    _, part = _packed(run_config, tmp_path / "trained")
    pair = {"checkpoint": "toy", "trained": str(part.folder)}
    for changes, message in (
        ({"decoder_tuning": {"method": "lora", "rank": 4, "alpha": 4}}, "alpha / rank"),
        ({"decoder_tuning": {"method": "full"}}, "alpha / rank"),
        ({"decoder_tuning": {"method": "lora", "rank": 8, "alpha": 16}}, r"of shape \[4, .*the run has \[8, "),
        ({"stages": [{"preset": "align", "steps": 1}]}, "learning rate of 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(run_config(pair=pair, **changes), device="cpu")
    with pytest.raises(DatasetError, match=r"trained\.json"):
        Trainer(run_config(pair={"checkpoint": "toy", "trained": str(tmp_path / "none")}), device="cpu")


@pytest.mark.slow
def test_a_rate_of_0_keeps_a_part_as_it_is(run_config: Config, tmp_path: Path) -> None:
    _, part = _packed(run_config, tmp_path / "trained")
    rates = {"adapter": 1e-3, "markers": 0, "encoder": 0, "decoder": 0}
    stage = {"preset": "decoder", "steps": 2, "row_tokens": 128, "chunk_sizes": {2: 1}, "learning_rates": rates}
    pair = {"checkpoint": "toy", "trained": str(part.folder)}
    trainer = Trainer(run_config(pair=pair, stages=[stage], output=str(tmp_path / "further")), device="cpu")
    trainer.run()
    changed = [n for n, t in part.tensors().items() if not torch.equal(trainer.trained[n].bfloat16(), t)]
    assert changed
    assert all(".adapter." in name for name in changed)


def test_a_packed_part_gets_token_columns_and_keeps_them(run_config: Config, tmp_path: Path) -> None:
    narrow = run_config(stages=[{"preset": "adapter", "steps": 1, "row_tokens": 128, "chunk_sizes": {2: 1}}])
    Trainer(narrow, device="cpu").run()
    pack_run(narrow, tmp_path / "narrow")
    stage = {"preset": "adapter", "steps": 3, "row_tokens": 128, "chunk_sizes": {2: 1}, "warmup_steps": 1}
    pair = {"checkpoint": "toy", "trained": str(tmp_path / "narrow")}
    further, wide = (
        run_config(pair={**pair, "token_columns": columns}, stages=[stage], output=str(tmp_path / f"columns_{columns}"))
        for columns in (False, True)
    )
    for config in (further, wide):
        Trainer(config, device="cpu").run()
    losses = [[row["loss"] for row in read_jsonl(Path(c.output) / "metrics.jsonl")] for c in (further, wide)]
    # The first step begins where the part ended, to the bit; then the new columns have learnt.
    assert losses[0][0] == losses[1][0]
    assert losses[0][2] != losses[1][2]

    exported, _, _ = load_model(export_pair(wide), device="cpu")
    assert exported.config.token_columns
    assert exported.memory_encoder.adapter.token_fc.weight.abs().sum() > 0
    pack_run(wide, tmp_path / "wide")
    folder = tmp_path / "assembled"
    save_checkpoint(folder, *starting_pair(narrow.pair, narrow.seed))
    merge_into_checkpoint(folder, TrainedPart.open(tmp_path / "wide"))
    merged, _, _ = load_model(folder, device="cpu")
    assert merged.config == exported.config
    expected = exported.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-2, atol=2e-3)
    with pytest.raises(ConfigError, match=r"adapter\.token_"):
        Trainer(run_config(pair={"checkpoint": "toy", "trained": str(tmp_path / "wide")}), device="cpu")


def test_the_gpu_recipe_goes_on_from_the_shipped_part() -> None:
    """It must fit what was packed, or a borrowed GPU is lost to an error; and what it packs must serve as much."""
    config = load_config(PROJECT_ROOT / "utils/training/configs/gpu_default.yaml")
    assert config.pair.trained is not None
    part = TrainedPart.open(PROJECT_ROOT / config.pair.trained)
    assert lora_scales(config) == part.lora_scales
    assert set(part.chunk_sizes) <= {size for stage in config.stages for size in stage.chunk_sizes}
    # The last stage takes what time there is.
    assert max(config.stages, key=lambda stage: stage.steps) is config.stages[-1]
