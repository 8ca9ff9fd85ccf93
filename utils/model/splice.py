"""Latents into the placeholder rows of a prompt's embeddings, strictly.

Shape legend: T prompt rows, D decoder width, n latents of one span.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from utils.errors import SpliceError


def splice_latents(
    embeds_TD: torch.Tensor, latents: Sequence[torch.Tensor], spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Put each span's latents into its rows.

    Args:
        embeds_TD: Token embeddings of the whole prompt, [T, D]; left as they are.
        latents: One [n, D] tensor a span, in order.
        spans: Half-open row ranges, ascending and disjoint.

    Returns:
        A new [T, D] tensor of `embeds_TD`'s dtype and device; gradients flow to embeddings and latents.

    Raises:
        SpliceError: Counts, widths or places do not agree.
    """
    if len(latents) != len(spans):
        raise SpliceError(f"the prompt has {len(spans)} spans but latents for {len(latents)} were given")
    num_rows, width = embeds_TD.shape
    pieces, copied = [], 0
    for number, ((start, stop), latent) in enumerate(zip(spans, latents, strict=True)):
        if not copied <= start < stop <= num_rows:
            raise SpliceError(
                f"span {number} is [{start}, {stop}): expected rows between {copied} and {num_rows}, in ascending order"
            )
        if latent.ndim != 2 or latent.shape[1] != width:
            raise SpliceError(f"span {number}: expected latents of width {width}, got shape {tuple(latent.shape)}")
        if latent.shape[0] != stop - start:
            raise SpliceError(
                f"span {number} has {stop - start} placeholders but {latent.shape[0]} latents: parse and encode with "
                "one --chunk-size"
            )
        pieces += [embeds_TD[copied:start], latent.to(device=embeds_TD.device, dtype=embeds_TD.dtype)]
        copied = stop
    pieces.append(embeds_TD[copied:])
    return join_rows(pieces)


def join_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`; on the CPU by plain copying, because waking torch's threads on a busy machine costs more than that.

    Args:
        parts: Tensors [n, D] of one dtype and device; gradients flow to them.

    Returns:
        A new tensor; or, where the parts are all of one tensor in order, that tensor itself.
    """
    if any(part.requires_grad for part in parts):
        return torch.cat([*parts])
    if (whole := _whole_of(parts)) is not None:
        return whole
    if parts[0].device.type != "cpu":
        return torch.cat([*parts])
    joined = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    np.concatenate([_bytes(part.contiguous()) for part in parts], out=_bytes(joined))
    return joined


def copy_rows(target: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows into a tensor of their shape; from a CUDA device without waiting for it."""
    if target.device.type == rows.device.type == "cpu":
        np.copyto(_bytes(target), _bytes(rows.contiguous()))
    else:
        target.copy_(rows, non_blocking=True)


def _whole_of(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor of which these parts are all rows, in order."""
    first, at = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or not part.is_contiguous():
            return None
        at += part.nbytes
    if first.storage_offset() or at - first.data_ptr() != first.untyped_storage().nbytes():
        return None
    return first.as_strided((sum(len(part) for part in parts), first.shape[1]), first.stride())


def _bytes(rows: torch.Tensor) -> np.ndarray:
    # NumPy has no bfloat16.
    return rows.view(torch.uint8).numpy()
