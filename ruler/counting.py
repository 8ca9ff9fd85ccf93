"""Token counts of long texts from the counts of their parts.

A prompt is a list of pieces that the tasks cut at spaces and line ends. Most pieces come back thousands of times (noise
lines, numbers, sentences), so counting them once each is a hundred times cheaper than counting every probe's text.

The sum is right only where no token reaches across a cut. A cut is trusted when

1. the tokenizer splits texts into words before it forms tokens (`splits_words`),
2. it lies before a single space or behind a line end, and
3. the tokenizer itself, given the two characters before it and the three behind it, forms the same tokens for the whole
   as for the halves.

Other cuts are undone: the two pieces are counted as one. A tokenizer without word splitting undoes them all, which is
the plain way of counting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ruler.tokenizers import TextTokenizer

_BEFORE, _BEHIND = 2, 3


class PieceCounter:
    """Counts tokens of texts given in pieces; remembers every piece and every cut it has seen."""

    def __init__(self, tokenizer: TextTokenizer, *, whole: bool = False) -> None:
        """Args:
        tokenizer: Counts the pieces.
        whole: Never add up; count each text in one go. The slow and certain way.
        """
        self.tokenizer = tokenizer
        self.adds_up = tokenizer.splits_words and not whole
        self._counts: dict[str, int] = {"": 0}
        self._cuts: dict[tuple[str, str], bool] = {}

    def count(self, pieces: Sequence[str]) -> int:
        """Tokens of the text `"".join(pieces)`."""
        if not self.adds_up:
            return self.count_whole("".join(pieces))
        amounts = Counter(self._join_untrusted(pieces))
        self._learn(amounts)
        counts = self._counts
        return sum(counts[piece] * times for piece, times in amounts.items())

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

    def count_each(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of each piece on its own."""
        self._learn(pieces)
        return [self._counts[piece] for piece in pieces]

    def _learn(self, pieces: Iterable[str]) -> None:
        """Count the pieces not seen before, in one batch."""
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._counts]
        if new:
            self._counts.update(zip(new, self.tokenizer.count(new), strict=True))

    def _join_untrusted(self, pieces: Sequence[str]) -> Sequence[str]:
        """The same text in pieces between which every cut is trusted."""
        ends = [piece[-_BEFORE:] for piece in pieces]
        starts = [piece[:_BEHIND] for piece in pieces]
        cuts = set(zip(ends, starts[1:], strict=False))
        known = self._cuts
        for cut in cuts - known.keys():
            known[cut] = self._trusts(*cut)
        if all(known[cut] for cut in cuts):
            return pieces
        joined = [pieces[0]]
        for end, start, piece in zip(ends, starts[1:], pieces[1:], strict=False):
            if known[end, start]:
                joined.append(piece)
            else:
                joined[-1] += piece
        return joined

    def _trusts(self, before: str, behind: str) -> bool:
        at_space = before[-1:].strip() != "" and behind[:1] == " " and behind[1:2].strip() != ""
        at_line = before[-1:] == "\n" and before[-2:-1].strip() != "" and behind[:1].strip() != ""
        if not (at_space or at_line):
            return False
        encode = self.tokenizer.encode
        return encode(before + behind) == encode(before) + encode(behind)
