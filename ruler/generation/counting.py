"""Token counts of long texts from the counts of their parts.

A prompt is a list of pieces that the tasks cut at spaces and line ends. Most pieces come back thousands of times (noise
lines, numbers, sentences), so counting them once each is a hundred times cheaper than counting every probe's text.

The sum is right only where no token reaches across a cut. A cut is trusted when

1. the tokenizer splits texts into words before it forms tokens (`splits_words`),
2. it lies before a single space or behind a line end, and
3. the tokenizer, given the characters on both sides of it, forms the same tokens for the whole as for the halves.

Other cuts are undone: the two pieces are counted as one. A tokenizer without word splitting undoes them all, which is
the plain way of counting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

from ruler.generation.tokenizers import TextTokenizer


class PieceCounter:
    """Counts tokens of texts given in pieces; remembers every piece and every cut it has seen."""

    def __init__(self, tokenizer: TextTokenizer, *, whole: bool = False, max_remembered: int = 500_000) -> None:
        """Args:
        tokenizer: Counts the pieces.
        whole: Never add up; count each text in one go. The slow and certain way.
        max_remembered: Pieces; some tasks never repeat theirs.
        """
        self.tokenizer = tokenizer
        self.adds_up = tokenizer.splits_words and not whole
        self._max_remembered = max_remembered
        self._counts: dict[str, int] = {}
        self._start = cache(_start)
        self._end = cache(_end)
        self._trusted = cache(self._trusts)

    def count(self, pieces: Sequence[str]) -> int:
        """Tokens of the text `"".join(pieces)`."""
        if not self.adds_up:
            return self.count_whole("".join(pieces))
        joined = self._join_untrusted(pieces)
        if len(self._counts) > self._max_remembered:
            self._counts.clear()
            self._start.cache_clear()
            self._end.cache_clear()
        # Not `set - keys()`, which walks through all the keys.
        if new := [piece for piece in set(joined) if piece not in self._counts]:
            self._counts.update(zip(new, self.tokenizer.count(new), strict=True))
        return sum(map(self._counts.__getitem__, joined))

    def count_whole(self, text: str) -> int:
        """Tokens of one text, counted by the tokenizer in one go."""
        return self.tokenizer.count([text])[0]

    def count_before(self, pieces: Sequence[str], position: int) -> int:
        """Tokens of the first `position` characters of the text `"".join(pieces)`."""
        start = 0
        for number, piece in enumerate(pieces):
            if start + len(piece) >= position:
                return self.count([*pieces[:number], piece[: position - start]])
            start += len(piece)
        return self.count(pieces)

    def _join_untrusted(self, pieces: Sequence[str]) -> Sequence[str]:
        """The same text in pieces between which every cut is trusted."""
        cuts = list(zip(map(self._end, pieces), map(self._start, pieces[1:]), strict=False))
        untrusted = {cut for cut in set(cuts) if not self._trusted(*cut)}
        if not untrusted:
            return pieces
        places = [place for place, cut in enumerate(cuts, start=1) if cut in untrusted]
        joined: list[str] = []
        done = 0
        for place in places:  # the pieces on both sides of each place become one
            if place > done:
                joined += pieces[done:place]
            joined[-1] += pieces[place]
            done = place + 1
        return [*joined, *pieces[done:]]

    def _trusts(self, before: str, behind: str) -> bool:
        at_space = before[-1:].strip() != "" and behind[:1] == " " and behind[1:2].strip() != ""
        at_line = before[-1:] == "\n" and before[-2:-1].strip() != "" and behind[:1].strip() != ""
        if not (at_space or at_line):
            return False
        encode = self.tokenizer.encode
        return encode(before + behind) == encode(before) + encode(behind)


def _start(piece: str) -> str:
    """The characters that a cut before `piece` is judged by."""
    return sys.intern(piece[:2])


def _end(piece: str) -> str:
    """The characters that a cut behind `piece` is judged by; before a line end, one more: ".\n" may be one token."""
    return sys.intern(piece[-2:] if piece.endswith("\n") else piece[-1:])
