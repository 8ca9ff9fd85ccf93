"""Whole runs of a few steps: exact resume after SIGKILL, SIGTERM, other settings, a full disk, skipped steps."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

from tests.support.processes import run_python, start_python, wait_until
from utils.errors import CheckpointError, ConfigError
from utils.files import read_jsonl
from utils.inference.inference import load_model
from utils.training.checkpoints import newest_checkpoint
from utils.training.config import TrainConfig
from utils.training.export import export_pair
from utils.training.loop import Trainer
from utils.training.losses import TrainedPair
from utils.training.rows import PackedRow
from utils.training.train import main

Values = Callable[..., dict[str, Any]]
Config = Callable[..., TrainConfig]


def start(path: Path, *flags: str) -> subprocess.Popen[str]:
    return start_python("-m", "utils.training.train", "--config", path, "--device", "cpu", *flags)


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = output / "metrics.jsonl"
    wait_until(lambda: len(metrics.read_text().splitlines()) >= step, process, 600)


def state_of(output: Path) -> tuple[int, dict[str, torch.Tensor]]:
    newest = newest_checkpoint(output)
    assert newest is not None
    return int(newest.name.removeprefix("step_")), load_file(newest / "trained.safetensors")


def long_stages(values: dict[str, Any], steps: int = 14) -> list[dict[str, Any]]:
    align, decoder = values["stages"]
    return [align, {**decoder, "steps": steps}]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_an_uninterrupted_run(
    run_config: Config, run_values: Values, tmp_path: Path
) -> None:
    values = run_values(save_minutes=0.0)
    values["stages"] = long_stages(values)
    whole = run_config(stages=values["stages"], output=str(tmp_path / "whole"))
    assert Trainer(whole, device="cpu").run() == "done"

    path = write_config(tmp_path / "run.yaml", values)
    output = Path(values["output"])
    process = start(path, "--no-export")
    wait_for_step(output, 6, process)  # inside the second stage
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(path, "--no-export", "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["outcome"] == "done"
    assert "going on from" in stderr

    step, resumed = state_of(output)
    whole_step, expected = state_of(Path(whole.output))
    assert step == whole_step == 16
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    losses = [[row["loss"] for row in read_jsonl(Path(o) / "metrics.jsonl")] for o in (output, whole.output)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["term", "ctrl-c"])
def test_a_signal_saves_and_ends_well(run_values: Values, tmp_path: Path, number: int, code: int) -> None:
    values = run_values()
    values["stages"] = long_stages(values, 5000)
    process = start(write_config(tmp_path / "run.yaml", values))
    wait_for_step(Path(values["output"]), 3, process)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert stdout.startswith("paused: ")
    assert state_of(Path(values["output"]))[0] >= 3


@pytest.mark.slow
def test_resuming_under_other_settings_is_refused(run_config: Config) -> None:
    Trainer(run_config(), device="cpu").run(last_stage=0)
    with pytest.raises(ConfigError, match=r"was written with seed = 0, the configuration says 1"):
        Trainer(run_config(seed=1), device="cpu").run()
    assert Trainer(run_config(threads=2, save_minutes=1.0), device="cpu").run() == "done"


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(run_values: Values, tmp_path: Path) -> None:
    values = run_values()
    values["stages"] = long_stages(values)
    path = write_config(tmp_path / "run.yaml", values)
    assert main(["--config", str(path), "--device", "cpu", "--stage", "0"]) == 0
    before = state_of(Path(values["output"]))
    # No file may grow beyond 100 kB: what a full disk does to a write, without filling one.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"from utils.training.train import main; sys.exit(main(['--config', {str(path)!r}, '--device', 'cpu']))"
    )
    ended = run_python("-c", code)
    assert ended.returncode == 1
    assert "could not be written" in ended.stderr
    assert "the last whole checkpoint is step_00000002" in ended.stderr
    after = state_of(Path(values["output"]))
    assert after[0] == before[0]
    assert not list(Path(values["output"]).rglob("*.tmp"))


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    run_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = TrainedPair.forward
    calls = iter(range(100))

    def sometimes_infinite(self: TrainedPair, row: PackedRow, *kinds: bool) -> torch.Tensor:
        return forward(self, row, *kinds) * (float("nan") if next(calls) == 3 else 1.0)

    monkeypatch.setattr(TrainedPair, "forward", sometimes_infinite)
    trainer = Trainer(run_config(), device="cpu")
    assert trainer.run() == "done"
    assert trainer.progress.skipped == 1
    assert all(bool(torch.isfinite(p).all()) for p in trainer.trained.values())
    assert "not finite" in caplog.text


@pytest.mark.slow
def test_trackers_get_what_the_metrics_file_gets(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(GeneralTracker):
        name = "recorder"
        requires_logging_directory = False
        main_process_only = True
        finished = False

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, Any]] = []

        @property
        def tracker(self) -> Recorder:
            return self

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            raise AssertionError

        def log(self, values: dict[str, Any], step: int | None, **more: Any) -> None:
            assert step == values["global_step"]
            self.rows.append(values)

        def finish(self) -> None:
            self.finished = True

    recorder = Recorder()
    trainer = Trainer(run_config(), device="cpu")
    monkeypatch.setattr(trainer.accelerator, "log_with", [recorder])
    trainer.run()
    assert recorder.rows == list(read_jsonl(Path(trainer.config.output) / "metrics.jsonl"))
    assert recorder.finished


def test_a_tracker_that_is_not_there_is_an_error(run_config: Config) -> None:
    with pytest.raises(ConfigError, match=r"trackers: notebook is not installed, or no tracker .*tensorboard"):
        Trainer(run_config(trackers=["notebook"]), device="cpu")


def test_training_that_diverges_ends_with_advice(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TrainedPair, "forward", lambda self, row, *kinds: next(self.memory_encoder.adapter.parameters()).sum() / 0
    )
    stage = {"preset": "align", "steps": 100, "row_tokens": 128}
    with pytest.raises(ConfigError, match="lower the learning rates"):
        Trainer(run_config(stages=[stage]), device="cpu").run()


@pytest.mark.slow
def test_only_the_parts_of_a_stage_learn(run_config: Config) -> None:
    config = run_config()
    trainer = Trainer(config, device="cpu")
    before = {name: p.detach().clone() for name, p in trainer.pair.named_parameters()}
    trainer.run(last_stage=0)
    changed = {name for name, p in trainer.pair.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("adapter" in name for name in changed)
    trainer.run()
    changed = {name for name, p in trainer.pair.named_parameters() if not torch.equal(p, before[name])}
    assert any("encoder.layers" in name for name in changed)
    assert "marker_rows.delta" in changed
    frozen = [name for name in changed if name.startswith("decoder.") and "lora_" not in name]
    assert not frozen


def test_a_part_at_a_rate_of_0_belongs_to_the_run_and_rests(run_config: Config) -> None:
    stage = {"preset": "decoder", "steps": 1, "row_tokens": 128, "chunk_sizes": {2: 1}}
    config = run_config(stages=[stage | {"learning_rates": {"adapter": 1e-3, "encoder": 0}}])
    trainer = Trainer(config, device="cpu")
    encoder = {name: p for name, p in trainer.pair.named_parameters() if ".encoder." in name}
    before = {name: p.detach().clone() for name, p in encoder.items()}
    trainer.run()
    assert encoder.keys() <= trainer.trained.keys() | {n for n in encoder if "embed_tokens" in n}
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in encoder.items())


@pytest.mark.slow
def test_gradient_checkpointing_changes_time_and_memory_only(run_config: Config, tmp_path: Path) -> None:
    states = []
    for again in (False, True):
        config = run_config(gradient_checkpointing=again, output=str(tmp_path / str(again)))
        assert Trainer(config, device="cpu").run() == "done"
        states.append(state_of(Path(config.output))[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_trains_and_keeps_what_learns_in_float32(run_config: Config) -> None:
    trainer = Trainer(run_config(precision="bfloat16"), device="cpu")
    assert trainer.run() == "done"
    assert {p.dtype for p in trainer.trained.values()} == {torch.float32}
    assert trainer.pair.decoder.get_input_embeddings().weight.dtype == torch.bfloat16
    losses = [row["loss"] for row in read_jsonl(Path(trainer.config.output) / "metrics.jsonl")]
    assert len(losses) == 6
    assert all(0 < loss < 200 for loss in losses)


@pytest.mark.slow
def test_the_exported_pair_computes_what_was_trained(run_config: Config, tmp_path: Path) -> None:
    config = run_config()
    trainer = Trainer(config, device="cpu")
    trainer.run()
    # Enough change for a mistake in the merging to be seen.
    for name, parameter in trainer.trained.items():
        if "lora_B" in name or "delta" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    trainer.save(None)
    row = trainer.packer(1).next_row()
    with torch.no_grad():
        expected = trainer.pair(row)
    folder = export_pair(config, tmp_path / "exported")
    model, _, processor = load_model(folder, device="cpu", chunk_size=2)
    assert model.config.chunk_sizes == (1, 2, 4)
    with torch.no_grad():
        found = TrainedPair(model, processor.tokenizers.markers)(row)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_dry_run_counts_and_writes_nothing(
    run_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values()
    path = write_config(tmp_path / "run.yaml", values)
    assert main(["--config", str(path), "--device", "cpu", "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert [stage["preset"] for stage in estimate["stages"]] == ["align", "decoder"]
    assert all(stage["flops"] > 0 and stage["hours"] > 0 for stage in estimate["stages"])
    assert not Path(values["output"]).exists()
    assert main(["--config", str(path), "--device", "cpu", "--dry-run"]) == 0
    assert "hours in all" in capsys.readouterr().out


@pytest.mark.slow
def test_metrics_and_the_curve_are_written(run_config: Config) -> None:
    config = run_config()
    Trainer(config, device="cpu").run()
    rows = list(read_jsonl(Path(config.output) / "metrics.jsonl"))
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (Path(config.output) / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((Path(config.output) / "checkpoints").iterdir())) == config.keep_checkpoints


def test_nothing_to_export_is_an_error(run_config: Config) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export_pair(run_config())
