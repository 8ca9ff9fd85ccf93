"""Parameters of a pair by name, their comparison with a checkpoint, and a pickle that shows that it was read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from utils.inference.inference import load_model
from utils.model.code_llava_model import CodeLLaVAModel

State = dict[str, torch.Tensor]


def parameters(model: CodeLLaVAModel) -> State:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_is(checkpoint: str | Path, wanted: State) -> None:
    """A checkpoint holds these parameters, to the bit and in their dtypes."""
    model, _, _ = load_model(checkpoint, device="cpu")
    torch.testing.assert_close(parameters(model), wanted, rtol=0, atol=0)


class Trap:
    """Unpickled, it makes the file that $TRAP names."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(os.environ["TRAP"]),))
