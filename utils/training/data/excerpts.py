"""Stretches of source files, cut at line ends: what training memories are made of."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def excerpt_range(lines: Sequence[str], start: int, num_chars: int) -> tuple[int, int]:
    """The half-open range of lines from `start` that fit into `num_chars`; at least one line."""
    used, stop = 0, start
    while stop < len(lines) and (stop == start or used + len(lines[stop]) <= num_chars):
        used += len(lines[stop])
        stop += 1
    return start, stop


def excerpt_around(random: Random, lines: Sequence[str], first: int, last: int, num_chars: int) -> tuple[int, int]:
    """A half-open range of lines of about `num_chars` that holds lines `first` to `last`, at a random place in it."""
    used = sum(map(len, lines[first : last + 1]))
    start, stop = first, last + 1
    before = random.random() * max(0, num_chars - used)
    while start > 0 and len(lines[start - 1]) <= before:
        start -= 1
        before -= len(lines[start])
        used += len(lines[start])
    while stop < len(lines) and used + len(lines[stop]) <= num_chars:
        used += len(lines[stop])
        stop += 1
    return start, stop
