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
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import overload

from utils.errors import DatasetError
from utils.files import sha256_bytes

logger = logging.getLogger(__name__)

# sha256 of the nouns joined by line ends, first 16 digits: the list that differs between wonderwords' releases.
KNOWN_NOUNS = {"d2e7b4a3fe536cfb": "3.0.1", "2ec8c8cdc8837fe0": "2.2.0"}
FILES = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}


@dataclass(frozen=True)
class WordLists:
    """The three lists, in file order.

    Attributes:
        nouns: Nouns.
        adjectives: Adjectives.
        verbs: Verbs.
    """

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
        self._blocks: list[str | list[str]] = []  # an adjective's prefix, or the pairs of a group
        group: list[str] = []
        for prefix in sorted(f"{adjective}-" for adjective in set(adjectives)):
            if group and not prefix.startswith(group[0]):
                self._add_block(group)
                group = []
            group.append(prefix)
        if group:
            self._add_block(group)
        sizes = (len(self._nouns) if isinstance(block, str) else len(block) for block in self._blocks)
        self._starts = [0, *accumulate(sizes)]

    def _add_block(self, prefixes: list[str]) -> None:
        if len(prefixes) == 1:
            self._blocks.append(prefixes[0])
        else:
            self._blocks.append(sorted({prefix + noun for prefix in prefixes for noun in self._nouns}))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        block, offset = self._blocks[number], index - self._starts[number]
        return block + self._nouns[offset] if isinstance(block, str) else block[offset]


def load_word_lists(folder: Path | None = None) -> WordLists:
    """Read the word lists.

    Args:
        folder: Where `nounlist.txt`, `adjectivelist.txt` and `verblist.txt` are; wonderwords' own without it.

    Raises:
        DatasetError: A list is missing, or wonderwords' nouns are of no release known here.
    """
    given = folder is not None
    folder = folder or _wonderwords_folder()
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


def _wonderwords_folder() -> Path:
    # Importing the package loads its own generators; the lists are all we want.
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or spec.origin is None:
        raise DatasetError("wonderwords is not installed: uv sync")
    return Path(spec.origin).parent / "assets"


def _hash(words: Sequence[str]) -> str:
    return sha256_bytes("\n".join(words).encode())[:16]
