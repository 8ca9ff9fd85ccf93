"""A haystack of HumanEval's solutions: the text of a problem is given, the name of the function that solves it wanted.

As in the `repoqa` tasks; the functions around the wanted one are the solutions of other problems, then, where all are
in, functions of the installed packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from random import Random

from ruler.generation.counting import PieceCounter
from ruler.generation.functions import CodeFunction
from ruler.generation.tasks.base import Streams
from ruler.generation.tasks.repoqa import NeedleFunction
from utils.errors import DatasetError


@dataclass
class SolutionHaystack(NeedleFunction):
    """Generator of `humaneval_haystack`.

    Attributes:
        problems: The solutions, with the problems' texts as descriptions.
    """

    problems: Sequence[CodeFunction] = field(default_factory=tuple)

    def begin(self, streams: Streams, counter: PieceCounter) -> None:
        super().begin(streams, counter)
        # Row after row asks for another problem, until all have been asked for.
        self._asked = streams.shuffled([problem for problem in self.problems if self.may_be_asked(problem)])
        if not self._asked:
            raise DatasetError(
                f"{self.task.name} at {self.max_tokens} tokens: none of the {len(self.problems)} problems can be asked "
                "for; use a larger --max-seq-length"
            )

    def _draw(self, random: Random, number: int) -> tuple[CodeFunction, Iterator[CodeFunction]]:
        wanted = self._asked[number % len(self._asked)]
        others = [problem for problem in self.problems if problem is not wanted]
        random.shuffle(others)
        return wanted, chain(others, self.pool.all(random))
