"""A CUDA device without one: tensors that have shapes and devices but no values, and a record of who waits.

    with fake_cuda(model) as record:       # moves the model; it is of no use afterwards
        model(…)                           # reading a value from the device raises
    assert not record.waits                # copies to the device that the host waits for

What it shows: that the operands of each operation lie on one device, that nothing asks the device for a value (which
waits for all that is queued there), and that what is copied there is pinned. Only forward passes: torch's autograd
engine wants the driver. Source of the mode: torch's `FakeTensorMode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Record:
    """What ran.

    Attributes:
        operations: Names of the operations, in order.
        waits: Those copies from the host to the device that the host waits for.
    """

    operations: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.record.operations.append(str(function))
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        came = any(x.device.type == "cpu" and x.dim() for x in tensors)
        if came and isinstance(result, torch.Tensor) and result.is_cuda and not _goes_on(function, args, kwargs):
            self.record.waits.append(f"{function} of {tuple(result.shape)}")
        return result


def _goes_on(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy leaves the host free to go on."""
    return bool(kwargs.get("non_blocking") or (str(function).startswith("aten.copy_") and len(args) > 2 and args[2]))


@contextmanager
def fake_cuda(model: torch.nn.Module) -> Iterator[Record]:
    """Put a model on a "cuda" device that holds no values."""
    record = Record()
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        # Without a driver no memory can be pinned. Who asks for pinned memory does not wait for the copy either.
        patch.object(torch.Tensor, "pin_memory", lambda self: self),
        patch("torch.cuda.mem_get_info", lambda device=None: (64 << 30, 80 << 30)),
        patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
        patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
        patch("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
    ):
        # Not `to`, which cannot put such tensors in the place of others. A tied weight is one tensor before and after.
        moved: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                if tensor not in moved:
                    there = fake.from_tensor(tensor.detach()).to("cuda")
                    moved[tensor] = torch.nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                (module._parameters if is_parameter else module._buffers)[name] = moved[tensor]
        with _Recorder(record):
            yield record
