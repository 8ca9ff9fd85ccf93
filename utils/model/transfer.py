"""Numbers from the host to a device, without waiting for it.

    ids = to_device(np.arange(5), torch.device("cuda"))

A copy to a GPU runs beside the work that is queued there only from pinned memory; from any other the host waits until
the queue is empty, and a forward pass that is short on the GPU then costs what launching it costs.
"""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy an array, or a tensor on the host, to a device.

    Args:
        values: Of any shape and dtype; must not be written to while a copy to a GPU may be under way.
        device: Where to.

    Returns:
        A tensor there; on the CPU one that shares the array's memory.
    """
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or host.device.type == "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
