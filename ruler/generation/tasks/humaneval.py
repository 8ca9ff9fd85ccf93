"""A haystack of HumanEval's solutions: the text of a problem is given, the name of the function that solves it wanted.

As in the `repoqa` tasks; the functions around the wanted one are the solutions of other problems, then, where all are
in, functions of the installed packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from random import Random

from ruler.generation.functions import CodeFunction
from ruler.generation.tasks.repoqa import NeedleFunction


@dataclass
class SolutionHaystack(NeedleFunction):
    """Generator of `humaneval_haystack`.

    Attributes:
        problems: The solutions, with the problems' texts as descriptions.
    """

    problems: Sequence[CodeFunction] = field(default_factory=tuple)

    def _askable(self, random: Random) -> Iterator[CodeFunction]:
        asked = [problem for problem in self.problems if self.may_be_asked(problem)]
        return iter(random.sample(asked, len(asked)))

    def _around(self, random: Random, wanted: CodeFunction) -> Iterator[CodeFunction]:
        others = [problem for problem in self.problems if problem is not wanted]
        random.shuffle(others)
        return chain(others, self.pool.around(random))
