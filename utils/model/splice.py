"""Latents into the placeholder rows of a prompt's embeddings, strictly.

Shape legend: T prompt rows, D decoder width, n latents of one span.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.errors import SpliceError
from utils.model.prompt import MemorySpan


def splice_spans(embeds_TD: torch.Tensor, latents: Sequence[torch.Tensor], spans: Sequence[MemorySpan]) -> torch.Tensor:
    """Put each span's latents into its placeholders' rows; those of chunks that are read as text are left out.

    Args:
        embeds_TD: Token embeddings of the whole prompt, [T, D]; left as they are.
        latents: One [n, D] tensor a span, in order, of all its chunks.
        spans: The prompt's spans.

    Returns:
        As `splice_latents`.

    Raises:
        SpliceError: Counts, widths or places do not agree.
    """
    if len(latents) != len(spans):
        raise SpliceError(f"the prompt has {len(spans)} spans but latents for {len(latents)} were given")
    parts, places = [], []
    for number, (span, latent) in enumerate(zip(spans, latents, strict=True)):
        if span.segments and len(latent) != span.num_chunks:
            raise SpliceError(f"span {number} has {span.num_chunks} chunks but {len(latent)} latents")
        for start, stop, chunk in span.latent_runs:
            parts.append(latent[chunk : chunk + stop - start] if span.segments else latent)
            places.append((start, stop))
    return splice_latents(embeds_TD, parts, places)


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
    return torch.cat(pieces)
