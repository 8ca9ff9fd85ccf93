"""English sentence boundaries: NLTK's Punkt with the parameters of `ruler/punkt_english`; nothing is downloaded.

RULER hides its needles between the sentences of an essay, so a benchmark file depends on every single boundary.

    english_splitter().tokenize("Dr. Who came. He left.")       # ['Dr. Who came.', 'He left.']

Source: Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary Detection", 2006; nltk.tokenize.punkt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from utils.errors import DatasetError

if TYPE_CHECKING:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

ENGLISH = Path(__file__).parents[1] / "punkt_english"


@cache
def english_splitter(folder: Path = ENGLISH) -> PunktSentenceTokenizer:
    """NLTK's sentence tokenizer with the packaged English parameters, loaded once.

    Args:
        folder: Parameters in NLTK's `punkt_tab` format.

    Raises:
        DatasetError: A file of `folder` is missing.
    """
    # Takes more than a second, and only the essay tasks need it.
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params

    try:
        return PunktSentenceTokenizer(load_punkt_params(_PackagedPath(folder)))
    except FileNotFoundError as error:
        raise DatasetError(f"the English sentence data is incomplete: {error.filename} does not exist") from None


@dataclass(frozen=True)
class _PackagedPath:
    """What NLTK's reader asks of a path. NLTK's own paths open nothing outside of its download folders."""

    path: Path

    def join(self, name: str) -> _PackagedPath:
        return _PackagedPath(self.path / name)

    def open(self, encoding: str) -> TextIO:
        return self.path.open(encoding=encoding)
