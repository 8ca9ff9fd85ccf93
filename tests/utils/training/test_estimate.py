"""The operations that an estimate promises, beside torch's count of the steps themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import flops
from utils.training.config import TrainConfig, parse_config
from utils.training.estimate import step_flops
from utils.training.loop import Trainer

TAUGHT = {"ratios": 2, "teacher_weight": 0.5, "row_tokens": 256}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "taught", "gradient_checkpointing"),
    # Torch's counter cannot follow a layer that is checkpointed where there are no gradients, as the teacher's are.
    [(0, {}, False), (0, {}, True), (1, {}, False), (1, {}, True), (1, TAUGHT, False)],
)
def test_flops(
    run_values: Callable[..., dict[str, Any]], number: int, taught: dict[str, Any], gradient_checkpointing: bool
) -> None:
    values = run_values(gradient_checkpointing=gradient_checkpointing)
    values["pair"]["token_columns"] = bool(taught)
    values["stages"][1] |= taught
    config = parse_config(values)
    trainer = Trainer(config, device="cpu")
    stage = config.stages[number]
    wrapped, optimizer = trainer.prepare(stage)
    for group in optimizer.param_groups:
        group["peak"] = 0.0
    rows = trainer.step_rows(trainer.packer(number), stage)
    with flops.counter() as counter:
        trainer.optimize(wrapped, optimizer, stage, rows, place=1)
    # The counter counts the whole square of attention, and counts marker rows, which are too few to reckon with.
    assert step_flops(trainer, stage, rows) == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_attention_counts(run_config: Callable[..., TrainConfig]) -> None:
    """Examples of a packed row do not see each other: two short ones cost less than one of both lengths."""
    config: Any = run_config()
    trainer = Trainer(config, device="cpu")
    stage = config.stages[1]
    rows = trainer.step_rows(trainer.packer(1), stage)
    row = max(rows, key=lambda row: len(row.lengths))
    assert len(row.lengths) > 1
    joined = dataclasses.replace(row, lengths=(sum(row.lengths),))
    assert step_flops(trainer, stage, [joined]) > step_flops(trainer, stage, [row])
