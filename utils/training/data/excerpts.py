"""Stretches of source files, cut at line ends: what training memories are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from utils.training.data.sources import SourceFile

# Characters of Python code per token, roughly, for tokenizers of 50k entries and more.
CHARS_PER_TOKEN = 3.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRange:
    """How long memories are, in tokens; drawn evenly over the logarithm, so that short ones are not rare."""

    shortest: int
    longest: int
    chars_per_token: float = CHARS_PER_TOKEN

    def draw_chars(self, random: Random) -> int:
        """A length in characters."""
        exponent = random.random()
        tokens = self.shortest * (self.longest / self.shortest) ** exponent
        return max(1, round(tokens * self.chars_per_token))


def draw_file(random: Random, files: Sequence[SourceFile]) -> SourceFile:
    """One file; longer ones as often as shorter ones, so that no package's giants dominate."""
    return files[random.randrange(len(files))]


def cut_excerpt(random: Random, lines: Sequence[str], num_chars: int) -> str:
    """Whole lines from a random place, at most `num_chars` characters (or one line, if that is longer)."""
    return "".join(lines[slice(*excerpt_range(lines, random.randrange(len(lines)), num_chars))])


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
