"""Word lists: wonderwords' nouns, adjectives and verbs, and the adjective-noun pairs that name RULER's needles.

The lists decide what every sample looks like, so their hash is known here and written to each manifest. RULER draws
from the sorted list of all adjective-noun pairs, 6.2 million strings; `WordPairs` is that list without making it.
"""

from __future__ import annotations

import importlib.util
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from utils.errors import DatasetError
from utils.files import sha256_bytes

logger = logging.getLogger(__name__)

# sha256 of the nouns joined by line ends, first 16 digits: the list that differs between wonderwords' releases.
KNOWN_NOUNS = {"d2e7b4a3fe536cfb": "3.0.1", "2ec8c8cdc8837fe0": "2.2.0"}
FILES = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}


@dataclass(frozen=True)
class WordLists:
    """The three lists, in file order."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @cached_property
    def nouns_hash(self) -> str:
        """First 16 hex digits of the nouns' sha256, as in `KNOWN_NOUNS`."""
        return _hash(self.nouns)

    @cached_property
    def provenance(self) -> dict[str, str]:
        """Which lists these are, for the manifest."""
        return {
            "wonderwords": KNOWN_NOUNS.get(self.nouns_hash, "unknown"),
            **{name: _hash(getattr(self, name)) for name in FILES},
        }

    @cached_property
    def pairs(self) -> WordPairs:
        """All adjective-noun pairs, sorted."""
        return WordPairs(self.adjectives, self.nouns)

    def shuffled(self, seed: int) -> list[str]:
        """All different words in the order that common-words samples draw from."""
        words = sorted({*self.nouns, *self.adjectives, *self.verbs})
        Random(seed).shuffle(words)
        return words


class WordPairs(Sequence[str]):
    """The sorted list of the different `adjective-noun` strings, made one at a time.

    Sorted adjectives with their hyphen give blocks of one block per adjective and sorted nouns in each, except where
    one adjective and its hyphen begin another (`ill-`, `ill-fated-`): their pairs interleave, and such a group is one
    block with its pairs spelled out.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        groups: list[list[str]] = []
        for prefix in sorted(f"{adjective}-" for adjective in set(adjectives)):
            if groups and prefix.startswith(groups[-1][0]):
                groups[-1].append(prefix)
            else:
                groups.append([prefix])
        # An adjective's prefix alone, or the pairs of a group.
        self._blocks = [
            group[0] if len(group) == 1 else sorted({prefix + noun for prefix in group for noun in self._nouns})
            for group in groups
        ]
        sizes = (len(self._nouns) if isinstance(block, str) else len(block) for block in self._blocks)
        self._starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        block, offset = self._blocks[number], index - self._starts[number]
        return block + self._nouns[offset] if isinstance(block, str) else block[offset]


@cache
def load_word_lists(folder: Path | None = None) -> WordLists:
    """Read the word lists.

    Args:
        folder: Where `nounlist.txt`, `adjectivelist.txt` and `verblist.txt` are; wonderwords' own without it.

    Raises:
        DatasetError: A list is missing, or wonderwords' nouns are of no release known here.
    """
    given = folder is not None
    if folder is None:
        # Importing the package loads its own generators; the lists are all we want.
        spec = importlib.util.find_spec("wonderwords")
        if spec is None or spec.origin is None:
            raise DatasetError("wonderwords is not installed: uv sync")
        folder = Path(spec.origin).parent / "assets"
    try:
        texts = {name: (folder / file).read_text(encoding="utf-8") for name, file in FILES.items()}
    except FileNotFoundError as error:
        raise DatasetError(
            f"{error.filename} does not exist: a word folder needs {', '.join(FILES.values())}"
        ) from None
    lists = WordLists(**{name: tuple(map(str.rstrip, text.splitlines())) for name, text in texts.items()})
    if lists.nouns_hash not in KNOWN_NOUNS:
        known = ", ".join(f"{digest} (wonderwords {release})" for digest, release in KNOWN_NOUNS.items())
        found = f"{folder / FILES['nouns']} has {len(lists.nouns)} nouns with hash {lists.nouns_hash}, expected {known}"
        if not given:
            raise DatasetError(f"{found}: other words give other samples; install wonderwords==3.0.1")
        logger.warning("%s: the samples compare with no published ones", found)
    return lists


def _hash(words: Sequence[str]) -> str:
    return sha256_bytes("\n".join(words).encode())[:16]
