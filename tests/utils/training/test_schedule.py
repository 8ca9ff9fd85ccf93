"""Learning rates by steps, and by the time where there is only so much of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support.stopping import StopAfter
from utils.files import read_jsonl
from utils.training.config import StageConfig, TrainConfig
from utils.training.loop import Trainer
from utils.training.schedule import Schedule, rate_factor
from utils.training.train import main

STAGE = StageConfig(
    preset="decoder", steps=1000, learning_rates={"adapter": 1.0}, chunk_sizes={4: 1.0}, warmup_steps=10, final_rate=0.1
)


def factors_of(schedule: Schedule, after_step: Callable[[], None] = lambda: None) -> list[float]:
    factors: list[float] = []
    while not schedule.is_over:
        factors.append(rate_factor(schedule.rate_place(len(factors)), schedule.stage))
        after_step()
        schedule.place = schedule.next_place()
    return factors


def test_by_steps_it_rises_then_falls_to_its_floor() -> None:
    factors = factors_of(Schedule(STAGE))
    assert len(factors) == 1000
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert sorted(factors[10:], reverse=True) == factors[10:]
    assert factors[505] == pytest.approx(0.55, abs=0.01)
    assert factors[-1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("step_s", [0.5, 2.0])
def test_a_time_budget_ends_it_however_many_steps_there_were(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("utils.training.schedule.time", SimpleNamespace(monotonic=lambda: clock.now))

    def a_step_takes_its_time() -> None:
        clock.now += step_s

    factors = factors_of(Schedule(STAGE, budget_s=100.0), a_step_takes_its_time)
    assert len(factors) == 100 / step_s
    # The warm-up is counted in steps all the same.
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[len(factors) // 2] == pytest.approx(0.55, abs=0.02)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def test_with_more_time_than_steps_it_ends_with_the_steps() -> None:
    assert len(factors_of(Schedule(STAGE, budget_s=1e6))) == 1000


def long_last_stage(values: dict[str, Any]) -> list[dict[str, Any]]:
    first, last = values["stages"]
    return [first, {**last, "steps": 1_000_000}]


def rates(output: str) -> list[float]:
    rows = list(read_jsonl(Path(output) / "metrics.jsonl"))
    return [row["rate_factor"] for row in rows if row["stage"] == 1]


@pytest.mark.slow
def test_a_run_of_so_many_minutes_is_done_when_they_are_over(
    run_values: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values()
    values["stages"] = long_last_stage(values)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["--config", str(path), "--device", "cpu", "--max-minutes", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["outcome"] == "done"
    assert result["steps"] < 1_000_000
    assert (Path(result["model"]) / "model_config.json").is_file()
    factors = rates(values["output"])
    assert factors[0] == 1.0
    assert sorted(factors, reverse=True) == factors
    assert factors[-1] < 0.2  # the floor is 0.1; the last step began a little before the end


def test_time_that_ends_before_the_last_stage_pauses_the_run(run_config: Callable[..., TrainConfig]) -> None:
    stages = [{"preset": "align", "steps": 1_000_000, "row_tokens": 128}, {"preset": "adapter", "steps": 1}]
    stages[1]["chunk_sizes"] = {1: 1}
    trainer = Trainer(run_config(stages=stages), device="cpu")
    assert trainer.run(deadline_s=1.0) == "paused"
    assert trainer.progress.stage == 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_its_place(
    run_values: Callable[..., dict[str, Any]], run_config: Callable[..., TrainConfig]
) -> None:
    stages = long_last_stage(run_values())
    config = run_config(stages=stages)
    assert Trainer(config, device="cpu", stop=StopAfter(12)).run(deadline_s=60.0) == "paused"
    before = rates(config.output)
    trainer = Trainer(config, device="cpu")
    assert trainer.run(deadline_s=2.0) == "done"
    factors = rates(config.output)
    assert 0 < len(before) < len(factors)
    assert before[-1] < 1.0
    assert sorted(factors, reverse=True) == factors
