"""What a pooled vector still says: how many tokens of a chunk a linear map reads back from it, by kind of pooling.

No training of the pair and no decoder: the encoder reads source text, its states are pooled, and one ridge regression
for each place in a chunk, fitted on part of the text, guesses the embedding of the token there; the nearest of the test
text's tokens is the answer. What a linear map finds, an adapter can hand on.
Shape legend: N chunks, E width of a pooled vector and of the encoder's table, c chunk size, K different tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from utils.benchmark.measure import markdown_table
from utils.benchmark.sources import load_compressor, source_tokens
from utils.errors import ConfigError
from utils.model.windows import plan_windows

_POOLINGS = ("mean", "rotary")
_TEST_PART = 0.1
# Of the regression: its penalty beside the variance of an input.
_RIDGE = 0.1
_DIGITS = "0123456789"


@torch.inference_mode()
def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures.

    Raises:
        ConfigError: Too little text for the largest chunk size.
    """
    if args.tokens < 64 * max(args.chunk_sizes) or min(args.chunk_sizes) < 1:
        raise ConfigError(f"--tokens: give at least 64 chunks of each size, {64 * max(args.chunk_sizes)} tokens")
    compressor = load_compressor(args)
    chunker = compressor.memory_encoder.chunker
    own_config = chunker.config
    tokenizer = compressor.processor.tokenizers.encoder
    ids = source_tokens(tokenizer, args.tokens)
    table_VE = chunker.encoder.get_input_embeddings().weight.float()
    digits = torch.tensor([tokenizer(digit, add_special_tokens=False)["input_ids"][-1] for digit in _DIGITS])
    rows, found = [], {}
    for size in args.chunk_sizes:
        whole = ids[: len(ids) // size * size]
        for pooling in _POOLINGS:
            chunker.config = dataclasses.replace(
                own_config, pooling=pooling, chunk_size=size, window=own_config.window // size * size, chunk_sizes=()
            )
            pooled_NE = torch.cat(chunker(plan_windows(whole, chunker.config))).float()
            shares = _read_back(pooled_NE, torch.tensor(whole).view(-1, size), table_VE, digits)
            found[f"{pooling}, chunk size {size}"] = shares
            rows.append((size, pooling, *(f"{share:.3f}" for share in shares.values())))
    header = ("chunk size", "pooling", "tokens in place", "digits in place", "tokens anywhere in the chunk")
    return markdown_table(header, rows), {"shares": found}


def _read_back(
    pooled_NE: torch.Tensor, ids_Nc: torch.Tensor, table_VE: torch.Tensor, digits: torch.Tensor
) -> dict[str, float]:
    """Shares of the last tokens that are guessed right by maps fitted on the others."""
    device = pooled_NE.device
    ids_Nc = ids_Nc.to(device)
    fitted = round(len(pooled_NE) * (1 - _TEST_PART))
    mean, spread = pooled_NE[:fitted].mean(dim=0), pooled_NE[:fitted].std(dim=0).clamp_min(1e-6)
    inputs_NE = ((pooled_NE - mean) / spread).double()
    fit_NE, test_NE = inputs_NE[:fitted], inputs_NE[fitted:]
    gram_EE = fit_NE.T @ fit_NE + _RIDGE * fitted * torch.eye(fit_NE.shape[1], device=device, dtype=torch.float64)
    inverse_EN = torch.linalg.solve(gram_EE, fit_NE.T)
    candidates_K = ids_Nc[fitted:].unique()
    rows_VE = F.normalize(table_VE.to(device), dim=-1).double()
    centre = rows_VE[ids_Nc[:fitted].flatten()].mean(dim=0)
    right, anywhere = [], []
    for place in range(ids_Nc.shape[1]):
        map_EE = inverse_EN @ (rows_VE[ids_Nc[:fitted, place]] - centre)
        nearest = ((test_NE @ map_EE) @ (rows_VE[candidates_K] - centre).T).argmax(dim=1)
        guess = candidates_K[nearest]
        right.append(guess == ids_Nc[fitted:, place])
        anywhere.append((guess[:, None] == ids_Nc[fitted:]).any(dim=1))
    right_Nc = torch.stack(right, dim=1)
    is_digit = torch.isin(ids_Nc[fitted:], digits.to(device))
    return {
        "in_place": float(right_Nc.float().mean()),
        "digits_in_place": float(right_Nc[is_digit].float().mean()) if bool(is_digit.any()) else float("nan"),
        "in_chunk": float(torch.stack(anywhere).float().mean()),
    }
