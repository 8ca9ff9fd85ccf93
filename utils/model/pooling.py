"""One vector for the hidden states of a chunk: one function a pooling, one row of `POOLINGS` each.

A mean forgets the order of what it is taken of, and an encoder cannot put it back, for it does not know where chunks
begin. *Rotary pooling* keeps the mean and puts a second one beside it, of states that were first turned by their place
in the chunk, as RoFormer (arXiv 2104.09864) turns queries and keys: place i turns pair j of the dimensions by
i·π(j + ½)/(H/2). At these angles the turns of different places are orthogonal, so a linear map can take each state out
of the sum, up to the others' noise (binding and superposition: Plate, "Holographic Reduced Representations", 1995).
Like the mean it has no weights and serves every chunk size.

Shape legend: N chunks, R states of a chunk, H encoder width, E pooled width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """A way to pool.

    Attributes:
        pool: States [N, R, H], zeros behind those of a short chunk, and how many are real [N, 1] → [N, E], in float32
            or the states' dtype.
        width: H, R → E.
        reads_marks: An end marker stands behind the window for each chunk, and its state is the chunk's only one.
    """

    pool: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    width: Callable[[int, int], int]
    reads_marks: bool = False


def mean(states_NRH: torch.Tensor, real_N1: torch.Tensor) -> torch.Tensor:
    """The mean of the states."""
    return states_NRH.sum(dim=1, dtype=torch.float32) / real_N1


def side_by_side(states_NRH: torch.Tensor, real_N1: torch.Tensor) -> torch.Tensor:
    """All states of the chunk, one after another."""
    return states_NRH.flatten(1)


def rotary(states_NRH: torch.Tensor, real_N1: torch.Tensor) -> torch.Tensor:
    """The mean, and beside it the mean of the states turned by their places."""
    return torch.cat([mean(states_NRH, real_N1), turned_sum(states_NRH) / real_N1], dim=-1)


def turned_sum(states_NRH: torch.Tensor) -> torch.Tensor:
    """[N, H] float32: the states of each chunk, each turned by its place, summed.

    The two halves of H are the two coordinates of the pairs.
    """
    size, width = states_NRH.shape[1:]
    pairs = torch.arange(width // 2, dtype=torch.float32, device=states_NRH.device)
    angles_RJ = torch.arange(size, device=pairs.device)[:, None] * (torch.pi * (pairs + 0.5) / len(pairs))
    cos, sin = angles_RJ.cos(), angles_RJ.sin()
    first, second = states_NRH.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin).sum(dim=1), (first * sin + second * cos).sum(dim=1)
    return torch.cat(turned, dim=-1)


POOLINGS = {
    "mean": Pooling(pool=mean, width=lambda width, size: width),
    "eos": Pooling(pool=side_by_side, width=lambda width, size: width, reads_marks=True),
    "concat": Pooling(pool=side_by_side, width=lambda width, size: width * size),
    "rotary": Pooling(pool=rotary, width=lambda width, size: 2 * width),
}
