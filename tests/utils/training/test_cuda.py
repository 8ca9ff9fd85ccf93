"""Training on CUDA: that nothing waits for the device, and, where there is one, that it trains what the CPU trains."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.support.fake_cuda import fake_cuda
from tests.support.marks import DEVICES
from tests.support.stopping import StopAfter
from utils.files import read_jsonl
from utils.training.config import TrainConfig, parse_config
from utils.training.loop import Trainer
from utils.training.rows import PackedRow

Config = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def _accelerator_of_its_own() -> Iterator[None]:
    """accelerate keeps one device a process; here each test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pair_and_row(config: TrainConfig) -> tuple[torch.nn.Module, PackedRow]:
    """A pair on the CPU as the second stage trains it, LoRA with an effect, and a row of several lengths and sizes."""
    trainer = Trainer(config, device="cpu")
    trainer.prepare(trainer.config.stages[1])
    torch.manual_seed(0)
    for name, parameter in trainer.pair.named_parameters():
        if "lora_B" in name or "delta" in name or "maps" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    row = trainer.packer(1).next_row()
    assert len(set(row.lengths)) > 1
    return trainer.pair, row


@pytest.mark.slow
@pytest.mark.parametrize("align", [False, True], ids=["next token and unpack", "align"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_forward_pass_waits_for_nothing(run_config: Config, precision: str, align: bool) -> None:
    lora = {"method": "lora", "rank": 4, "alpha": 8}
    pair, row = pair_and_row(run_config(precision=precision, encoder_tuning=lora))
    half = precision == "bfloat16"
    with fake_cuda(pair) as record, torch.autocast("cuda", torch.bfloat16, enabled=half):
        losses = pair(row, align, not align)
    assert losses.is_cuda
    assert record.waits == []
    if not align:
        attention = [name for name in record.operations if "varlen_attn" in name]
        assert bool(attention) == half


def taught(run_values: Callable[..., dict[str, Any]], **changes: Any) -> tuple[torch.nn.Module, PackedRow]:
    """A pair with token columns, and a row of two readings an example, with a teacher that is untouched in a part."""
    values = run_values(pair={"checkpoint": "toy", "token_columns": True}, **changes)
    values["stages"][1] |= {"row_tokens": 256, "ratios": 2, "teacher_weight": 0.5}
    pair, row = pair_and_row(parse_config(values))
    torch.nn.init.normal_(pair.get_submodule("memory_encoder.adapter.token_fc").weight, std=0.05)  # type: ignore[arg-type]
    assert row.shared
    assert row.teacher is not None
    # As the task chat would have it, which a toy has no examples of; and of what the teacher itself says.
    is_trained = torch.arange(len(row.teacher.input_ids)) >= row.teacher.lengths[0]
    row = dataclasses.replace(row, teacher=dataclasses.replace(row.teacher, is_trained=is_trained))
    return pair, row


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_waits_for_nothing(run_values: Callable[..., dict[str, Any]], precision: str) -> None:
    pair, row = taught(run_values, precision=precision)
    with fake_cuda(pair) as record, torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
        losses = pair(row, False, True)
    assert losses.is_cuda
    assert losses.shape == (4,)
    assert record.waits == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "taught"])
def test_losses_and_gradients_are_the_cpus(
    run_values: Callable[..., dict[str, Any]], precision: str, device: str, kind: str
) -> None:
    if kind == "taught":
        pair, row = taught(run_values, precision=precision)
    else:
        pair, row = pair_and_row(parse_config(run_values(precision=precision)))
    plain = copy.deepcopy(pair).float()
    pair.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        losses = pair(row, False, True)
    losses.sum().backward()
    expected = plain(row, False, True)
    expected.sum().backward()
    half = precision == "bfloat16"
    torch.testing.assert_close(losses.detach().float().cpu(), expected.detach(), rtol=3e-2 if half else 1e-4, atol=0)
    wanted = dict(plain.named_parameters())
    for name, parameter in pair.named_parameters():
        if parameter.grad is not None:
            got, reference = parameter.grad.float().cpu().flatten(), wanted[name].grad
            assert reference is not None
            if half:
                cosine = torch.cosine_similarity(got, reference.flatten(), dim=0)
                assert cosine > 0.9 or float(reference.norm()) < 1e-3, f"{name}: {float(cosine):.3f}"
            else:
                scale = float(reference.abs().max())
                torch.testing.assert_close(got, reference.flatten(), rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_that_is_resumed_goes_on_as_it_would_have(
    run_config: Config, tmp_path: Path, precision: str, device: str
) -> None:
    losses = []
    for name, stops in (("whole", [100]), ("resumed", [4, 100])):
        config = run_config(precision=precision, output=str(tmp_path / name))
        for times in stops:
            AcceleratorState._reset_state(reset_partial_state=True)
            trainer = Trainer(config, device="cpu" if device == "cpu" else "auto", stop=StopAfter(times))
            outcome = trainer.run()
            assert trainer.accelerator.device.type == device
        assert outcome == "done"
        losses.append([row["loss"] for row in read_jsonl(Path(config.output) / "metrics.jsonl")])
    assert len(losses[0]) == len(losses[1]) == 6
    exact = device == "cpu"
    assert losses[1] == (losses[0] if exact else pytest.approx(losses[0], rel=1e-3 if precision == "float32" else 3e-2))


@pytest.mark.slow
def test_the_optimisers_state_comes_back_beside_its_parameters(run_config: Config) -> None:
    """Fused AdamW on CUDA refuses a count of steps that lies elsewhere; the meta device shows it without one."""
    from utils.training.checkpoints import newest_checkpoint, restore

    config = run_config()
    trainer = Trainer(config, device="cpu", stop=StopAfter(4))
    assert trainer.run() == "paused"
    folder = newest_checkpoint(config.output)
    assert folder is not None
    elsewhere = {name: torch.nn.Parameter(p.detach().to("meta")) for name, p in trainer.trained.items()}
    optimizer = torch.optim.AdamW(elsewhere.values())
    restore(folder, elsewhere, optimizer)
    assert optimizer.state
    tensors: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
