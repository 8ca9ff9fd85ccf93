"""A run's folder: one run at a time, no leftovers, and whatever its files hold a whole checkpoint or one error."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support.processes import start_python
from utils.errors import CheckpointError, CodeLlavaError, ConfigError
from utils.files import read_jsonl
from utils.locks import sole_writer
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.processor import Processor
from utils.training.checkpoints import check_fits, newest_checkpoint, whole_checkpoint
from utils.training.config import DataConfig, TrainConfig, parse_config
from utils.training.data.build import build_examples
from utils.training.data.folder import open_caches, tokenize_folder
from utils.training.export import export_pair, pack_run
from utils.training.loop import Trainer
from utils.training.toy import build_toy_pair
from utils.training.train import main

Values = Callable[..., dict[str, Any]]
ODD = ["", "[]", "{}", "null", "5", '"x"', '{"stage": "x", "global_step": "y"}', '{"config": {}}', "[" * 50_000]
TENSORS = {"w": torch.zeros(2)}


@dataclasses.dataclass
class Run:
    """A finished run, and a way back to it."""

    trainer: Trainer
    saved: Path

    @property
    def folder(self) -> Path:
        return Path(self.trainer.config.output)

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*"))

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.saved, self.folder)


@pytest.fixture(scope="module")
def finished(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    stage = {"steps": 3, "row_tokens": 64}
    values = {
        "name": "tiny",
        "output": str(folder / "run"),
        "pair": {"checkpoint": "toy"},
        "threads": 1,
        "log_every": 1,
        "save_minutes": 0.0,
        "data": {"folder": str(toy_data)},
        "stages": [{"preset": "align", **stage}],
    }
    trainer = Trainer(parse_config(values), device="cpu")
    trainer.run()
    shutil.copytree(folder / "run", folder / "saved")
    return Run(trainer, folder / "saved")


@pytest.fixture
def run(finished: Run) -> Run:
    """Two checkpoints: step 2, within the stage, and step 3, behind it."""
    finished.restore()
    assert [path.name for path in finished.checkpoints] == ["step_00000002", "step_00000003"]
    return finished


def state(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_of(folder / "trained.safetensors")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """In memory: these tests write over files that would otherwise stay mapped."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def damages() -> Iterator[Any]:
    for number, text in enumerate(ODD):
        yield pytest.param("progress.json", text.encode(), id=f"progress{number}")
    for name in ("trained", "optimizer"):
        for data in (None, b"", b"\0" * 100, b"\xff" * 8 + b"{}", "half", "shape", "name", "extra"):
            yield pytest.param(f"{name}.safetensors", data, id=f"{name}-{data!r:.12}")
    yield pytest.param("progress.json", None, id="no-progress")
    yield pytest.param("progress.json", "half", id="half-progress")


def damage(path: Path, data: bytes | str | None) -> None:
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data is None:
        path.unlink()
    elif data == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        tensors = tensors_of(path)
        name = max(tensors)
        tensor = tensors.pop(name)
        if data == "shape":
            tensors[name] = tensor.flatten()[:-1].clone()
        elif data == "extra":
            tensors |= {name: tensor, "more": tensor.clone()}
        save_file(tensors, path)


@pytest.mark.parametrize(("name", "data"), list(damages()))
def test_the_older_checkpoint_takes_a_damaged_ones_place(
    name: str, data: bytes | str | None, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = run.checkpoints
    damage(newest / name, data)
    trainer = run.trainer
    found = whole_checkpoint(trainer.config, lambda folder, p: check_fits(folder, trainer.trained, p.step > 0))
    assert found is not None
    assert found[0] == older
    assert str(newest / name) in caplog.text
    assert older.name in caplog.text


def test_a_run_goes_on_from_the_older_checkpoint_bit_for_bit(run: Run) -> None:
    older, newest = run.checkpoints
    expected = state(newest)
    damage(newest / "trained.safetensors", "half")
    assert run.trainer.run() == "done"
    assert [path.name for path in run.checkpoints] == [older.name, newest.name]
    for key, tensor in state(newest).items():
        assert torch.equal(tensor, expected[key])
    steps = [row["global_step"] for row in read_jsonl(run.folder / "metrics.jsonl")]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("text", ODD[:4])
def test_no_whole_checkpoint_is_one_error(text: str, run: Run) -> None:
    for folder in run.checkpoints:
        (folder / "progress.json").write_text(text)
    before = {path for path in run.folder.rglob("*") if path.name != ".lock"}
    for use in (run.trainer.run, lambda: export_pair(run.trainer.config)):
        with pytest.raises(CheckpointError, match=f"{run.checkpoints[-1]}.* delete {run.folder}") as caught:
            use()
        assert str(caught.value).isprintable()
    assert {path for path in run.folder.rglob("*") if path.name != ".lock"} == before


def test_other_settings_stay_an_error(run: Run) -> None:
    path = run.checkpoints[-1] / "progress.json"
    values = json.loads(path.read_text())
    values["config"]["seed"] = 7
    del values["sha256"]  # as an older run wrote it
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="seed = 7"):
        run.trainer.run()


def test_export_and_pack_take_the_whole_checkpoint(run: Run, tmp_path: Path) -> None:
    (run.checkpoints[-1] / "trained.safetensors").write_bytes(b"")
    assert export_pair(run.trainer.config, tmp_path / "model").is_dir()
    manifest = pack_run(run.trainer.config, tmp_path / "part")
    assert manifest["run"]["global_step"] == 2


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place of it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        change = mutated(value[key], chance)
        return {**{k: v for k, v in value.items() if k != key}, **({} if change is None else {key: change})}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutated(value[at], chance), *value[at + 1 :]]
    odd = [None, -1, 0, 1.5, 1 << 70, float("nan"), float("inf"), True, "x", "", [], {}, [[]], {"": {}}, 10**400]
    return chance.choice(odd)


def fuzz(run: Run, seeds: range) -> None:
    """Every JSON file of a run's folder in every state: done, or one of our errors."""
    for seed in seeds:
        run.restore()
        chance = random.Random(seed)
        files = [path / "progress.json" for path in run.checkpoints] + [run.folder / "metrics.jsonl"]
        for path in chance.sample([*files, run.folder / "run.json"], chance.randint(1, 3)):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            at = chance.randrange(len(lines))
            if chance.random() < 0.2:
                lines[at] = lines[at][: chance.randrange(len(lines[at]))]
            else:
                lines[at] = json.dumps(mutated(json.loads(lines[at]), chance))
            path.write_text("\n".join(lines))
        message = outcome(run)
        if message == "done":
            assert all(0 <= row["global_step"] <= 3 for row in read_jsonl(run.folder / "metrics.jsonl"))
        else:
            assert "\n" not in message, seed
            assert "step_" in message, seed


def outcome(run: Run) -> str:
    """What a run says: done, or the message of one of our errors."""
    try:
        return run.trainer.run()
    except CodeLlavaError as error:
        return str(error)


def test_whatever_the_json_files_hold(run: Run) -> None:
    fuzz(run, range(4))


@pytest.mark.slow
def test_whatever_the_json_files_hold_for_long(run: Run) -> None:
    fuzz(run, range(4, 400))


def test_metrics_of_a_killed_run(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run.checkpoints[-1])
    path = run.folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    beyond = lines[-1].replace(b'"global_step": 3', b'"global_step": 9')
    path.write_bytes(b"".join([*lines, beyond, b"\xff\n", b"[1]\n", lines[-1][:20]]))
    run.trainer.run()
    assert [row["global_step"] for row in read_jsonl(path)] == [1, 2, 3]
    assert f"{path}: 3 damaged" in caplog.text


def test_leftovers_of_killed_saves_are_removed(run: Run, tmp_path: Path) -> None:
    checkpoints = run.folder / "checkpoints"
    for name in (".step_00000003.abcd1234.tmp", ".step_00000003.abcd1234.old", ".notes.abcd1234.tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "trained.safetensors").write_bytes(b"x")
    (run.folder / ".model.abcd1234.tmp").mkdir()
    (run.folder / ".run.json.abcd1234.tmp").write_text("{")
    (run.folder / ".step_00000003.abcd1234.tmp").mkdir()
    # A checkpoint that had been put aside for a new one, which never came.
    run.checkpoints[-1].rename(checkpoints / ".step_00000003.efgh5678.old")
    (checkpoints / ".step_00000003.abcd1234.old").rename(tmp_path / "away")
    assert run.trainer.run() == "done"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        ".notes.abcd1234.tmp", "step_00000002", "step_00000003",
    ]  # fmt: skip
    hidden = {path.name for path in run.folder.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".step_00000003.abcd1234.tmp"}
    found = whole_checkpoint(run.trainer.config)
    assert found is not None
    assert found[1].global_step == 3


def hold(folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from utils.locks import sole_writer\nwith sole_writer(sys.argv[1]): print(1, flush=True); input()"
    )
    process = start_python("-c", code, folder)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_second_run_in_a_folder_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "checkpoints" / ".step_00000009.abcd1234.tmp").mkdir()
    path = tmp_path / "run.yaml"
    values = {"name": "t", "output": str(run.folder), "pair": {"checkpoint": "toy"}, "data": {"folder": "none"}}
    path.write_text(yaml.safe_dump({**values, "stages": [{"preset": "align", "steps": 1, "row_tokens": 64}]}))
    other = hold(run.folder)
    try:
        before = sorted(run.folder.rglob("*"))
        with pytest.raises(ConfigError, match=f"{run.folder} .*{other.pid}"):
            run.trainer.run()
        assert main(["--config", str(path), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert str(run.folder) in error
        assert str(other.pid) in error
        assert sorted(run.folder.rglob("*")) == before
    finally:
        other.kill()
        other.communicate()
    assert run.trainer.run() == "done"


def test_data_and_parts_have_one_writer(run: Run, tmp_path: Path) -> None:
    data = DataConfig(folder=str(tmp_path / "data"), tasks={"copy_symbols": 3}, source="symbols")
    other = hold(tmp_path / "data")
    try:
        with pytest.raises(ConfigError, match=f"{tmp_path / 'data'} .*{other.pid}"):
            build_examples(data)
    finally:
        other.kill()
        other.communicate()
    (tmp_path / "data" / ".copy_symbols.jsonl.abcd1234.tmp").write_text("half")
    build_examples(data)
    hidden = {path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")}
    assert hidden == {".lock"}
    (tmp_path / ".part.abcd1234.tmp").mkdir()
    with sole_writer(tmp_path / "other"):
        pack_run(run.trainer.config, tmp_path / "part")
    assert not (tmp_path / ".part.abcd1234.tmp").exists()


@pytest.fixture(scope="module")
def pair() -> tuple[CodeLLaVAModel, Processor]:
    model, tokenizers = build_toy_pair()
    return model, Processor(tokenizers=tokenizers, chunk_size=2)


@pytest.fixture(scope="module")
def made(pair: tuple[CodeLLaVAModel, Processor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of examples, built and tokenised."""
    folder = tmp_path_factory.mktemp("made")
    open_caches(data_run(folder), *pair)
    return folder


def data_run(folder: Path) -> TrainConfig:
    data = {"folder": str(folder), "source": "symbols", "chars_per_token": 1, "memory_tokens": [4, 12]}
    stage = {"preset": "align", "steps": 1}
    values = {"name": "t", "output": "unused", "pair": {"checkpoint": "toy"}, "stages": [stage]}
    return parse_config({**values, "data": {**data, "tasks": {"copy_symbols": 20}}})


@pytest.mark.parametrize("name", ["report.json", "copy_symbols.tokens/meta.json"])
@pytest.mark.parametrize("text", [*ODD, '{"tasks": 5}', '{"tasks": {"copy_symbols": []}}', '{"version": 5}'])
def test_damaged_json_of_data_is_one_error(
    name: str, text: str, pair: tuple[CodeLLaVAModel, Processor], made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made, tmp_path / "data")
    (folder / name).write_text(text)
    with pytest.raises(CodeLlavaError, match=f"{folder}.*delete") as caught:
        open_caches(data_run(folder), *pair)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["decoder.i32", "encoder.i32", "index.npz"])
@pytest.mark.parametrize("change", ["half", "flipped", "missing"])
def test_damaged_tokens_are_one_error(
    name: str, change: str, pair: tuple[CodeLLaVAModel, Processor], made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made, tmp_path / "data")
    path = folder / "copy_symbols.tokens" / name
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if change == "half" else data[:-9] + b"\x7f" + data[-8:])
    with pytest.raises(CodeLlavaError, match=f"{path} .*delete {path.parent}"):
        open_caches(data_run(folder), *pair)


def start(path: Path, *more: str) -> subprocess.Popen[str]:
    return start_python(*more, "-m", "utils.training.train", "--config", path, "--device", "cpu", "--no-export")


@pytest.mark.slow
def test_killed_saves_leave_nothing(run_values: Values, tmp_path: Path) -> None:
    values = run_values(save_minutes=0.0)
    values["stages"][1]["steps"] = 4000
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    checkpoints = Path(values["output"]) / "checkpoints"
    for _ in range(2):
        process = start(path)
        before = newest_checkpoint(values["output"])
        while process.poll() is None and (
            newest_checkpoint(values["output"]) == before or not list(checkpoints.glob(".*.tmp"))
        ):
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    left, before = list(checkpoints.glob(".*")), newest_checkpoint(values["output"])
    process = start(path)
    # Its first checkpoint says that it listens to signals by now.
    while process.poll() is None and (
        newest_checkpoint(values["output"]) == before or any(folder.exists() for folder in left)
    ):
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert list(checkpoints.glob(".*")) == []


@pytest.mark.slow
def test_several_processes_learn_that_the_folder_is_taken(run_values: Values, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = run_values()
    for stage in values["stages"]:
        stage["rows"] = 2
    path.write_text(yaml.safe_dump(values))
    other = hold(Path(values["output"]))
    launch = ["-m", "accelerate.commands.launch", "--config_file", "utils/training/configs/accelerate_ddp.yaml"]
    began = time.monotonic()
    process = start(path, *launch, "--main_process_port", "0")
    _, err = process.communicate(timeout=300)
    other.kill()
    other.communicate()
    assert process.returncode == 1
    assert f"error: {values['output']}" in err
    assert str(other.pid) in err
    assert time.monotonic() - began < 240


def test_data_that_are_no_file_are_one_error(pair: tuple[CodeLLaVAModel, Processor], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(CodeLlavaError, match=r"rows\.jsonl is no file"):
        tokenize_folder(tmp_path, pair[1])
