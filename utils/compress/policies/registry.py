"""The policies by name.

A policy's `score(memories, question)` gives one number for each piece of all memories, in order: the greater, the
sooner the piece stays text; a piece with 0 or less never does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils.compress.policies import all_text, answer, bm25, latents, no_text, random_pieces
from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.compress.select import MemoryText, Question


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to select.

    Attributes:
        score: See above.
        reads_query: It needs a query that is not empty.
    """

    score: Callable[[Sequence[MemoryText], Question], np.ndarray]
    reads_query: bool = True


POLICIES = {
    "bm25": Policy(bm25.score),
    "latents": Policy(latents.score),
    "random": Policy(random_pieces.score, reads_query=False),
    "answer": Policy(answer.score, reads_query=False),
    "all": Policy(all_text.score, reads_query=False),
    "none": Policy(no_text.score, reads_query=False),
}
# Those that need no budget: everything, or nothing.
WHOLE = ("all", "none")


def find_policy(name: str) -> Policy:
    """The policy of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]
