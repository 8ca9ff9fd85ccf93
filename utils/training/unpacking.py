"""The unpack loss: from each latent alone, which tokens stand in its chunk, and in which place.

    unpacker = Unpacker(latent_width=576, table_width=576)
    loss = unpacker(latents, spans, encoder_table)          # summed over the tokens of all chunks it covers

Pooling forgets order: `17` and `71` in one chunk give latents that the next-token loss tells apart only through the
whole decoder and a few answers. Here every memory token is a label: a linear map for each place in a chunk reads it
back from the latent, and encoder and adapter learn to keep it there. The maps are thrown away afterwards.

It costs nothing beside the decoder: the right token is found among the tokens of the row, not the vocabulary.
Shape legend: N latents, D their width, c chunk size, K different tokens in the row, E width of the encoder's table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.model.prompt import MemorySpan
from utils.model.transfer import to_device

# Longest chunk that is unpacked: of a longer one's tokens, most do not come back from one linear map.
MAX_PLACES = 8
_PADDING = -100


class Unpacker(nn.Module):
    """Linear maps from a latent to the encoder's embedding of each token in its chunk; at first all zero.

    Args:
        latent_width: D.
        table_width: E.
    """

    def __init__(self, latent_width: int, table_width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(latent_width)
        self.maps = nn.Parameter(torch.zeros(MAX_PLACES, latent_width, table_width))

    def forward(
        self, latents: Sequence[torch.Tensor], spans: Sequence[MemorySpan], table_VE: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy summed over the tokens of all spans whose chunk size is at most `MAX_PLACES`."""
        # Every parameter takes part in every row, as distributed wrappers want it.
        loss = 0.0 * (self.maps.sum() + self.norm.weight.sum())
        covered = [(rows, span) for rows, span in zip(latents, spans, strict=True) if is_unpacked(span)]
        if not covered:
            return loss
        # On the host: which tokens are different is known there without waiting for the device.
        lengths = [len(span.token_ids) for _, span in covered]
        candidates_K, places = np.unique(np.concatenate([span.token_ids for _, span in covered]), return_inverse=True)
        labels = np.split(places, np.cumsum(lengths)[:-1])
        rows_KE = F.normalize(table_VE[to_device(candidates_K, table_VE.device)].detach().float(), dim=-1)
        for size in sorted({span.chunk_size for _, span in covered}):
            chosen = [number for number, (_, span) in enumerate(covered) if span.chunk_size == size]
            latents_ND = torch.cat([covered[number][0] for number in chosen])
            labels_Nc = np.concatenate([_in_chunks(labels[number], size) for number in chosen])
            guesses_NcE = torch.einsum("nd,cde->nce", self.norm(latents_ND.float()), self.maps[:size])
            logits_NcK = (guesses_NcE @ rows_KE.T).float()
            loss = loss + F.cross_entropy(
                logits_NcK.flatten(0, 1),
                to_device(labels_Nc.ravel(), table_VE.device),
                ignore_index=_PADDING,
                reduction="sum",
            )
        return loss


def is_unpacked(span: MemorySpan) -> bool:
    """Whether the unpack loss covers a span."""
    return span.chunk_size <= MAX_PLACES


def unpacked_tokens(spans: Sequence[MemorySpan]) -> int:
    """Tokens of these spans that the unpack loss covers."""
    return sum(len(span.token_ids) for span in spans if is_unpacked(span))


def _in_chunks(labels: np.ndarray, size: int) -> np.ndarray:
    """A span's labels as [N, c]; the last chunk may be short."""
    return np.pad(labels, (0, -len(labels) % size), constant_values=_PADDING).reshape(-1, size)
