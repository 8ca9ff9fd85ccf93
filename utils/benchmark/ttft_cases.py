"""Which cases the time-to-first-token benchmark measures. Knows no model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from utils.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One point of the sweep.

    Attributes:
        tokens: Memory tokens of a prompt.
        dtype: As the flag names it.
        batch: Prompts at once.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        spans: Memory spans of a prompt.
    """

    tokens: int
    dtype: str
    batch: int
    chunk_size: int | None
    spans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cases that have the full text in common: they are measured in the same rounds."""

    tokens: int
    dtype: str
    batch: int
    cases: tuple[Case, ...]


def plan(args: argparse.Namespace) -> list[Group]:
    """The cases that the flags describe, each once.

    Raises:
        ConfigError: A count below one.
    """
    base = Case(tokens=args.tokens, dtype=args.dtype, batch=args.batch, chunk_size=args.chunk_size, spans=args.spans)
    also: dict[str, list[Any]] = {
        "tokens": args.also_tokens,
        "dtype": args.also_dtypes,
        "batch": args.also_batches,
        "chunk_size": args.also_chunk_sizes,
        "spans": args.also_spans,
    }
    cases = [base]
    if args.product:
        values = [[getattr(base, name), *more] for name, more in also.items()]
        cases += [Case(**dict(zip(also, chosen, strict=True))) for chosen in itertools.product(*values)]
    else:
        cases += [dataclasses.replace(base, **{name: value}) for name, more in also.items() for value in more]
    for case in cases:
        if min(case.tokens, case.batch, case.spans, args.repeats) < 1:
            raise ConfigError(f"tokens, spans, batch and repeats must be at least 1, got {case}")
    groups: dict[tuple[str, int, int], list[Case]] = {}
    for case in dict.fromkeys(cases):
        groups.setdefault((case.dtype, case.batch, case.tokens), []).append(case)
    return [
        Group(tokens=tokens, dtype=dtype, batch=batch, cases=tuple(same))
        for (dtype, batch, tokens), same in groups.items()
    ]
