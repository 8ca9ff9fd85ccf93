"""RepoQA's needle functions: the author's description of a function is given, its name or its code wanted.

The context is functions of real files without their documentation, each under the path of its file. Sizes are steps of
eight characters. The functions around the wanted one come from its own file first, then from its project, then from the
others, and lie in a random order. Of the wanted function's name nothing else in the prompt has a trace: the description
does not hold it, no other function or path mentions it, and no other function has nearly the same code.

Source: Liu et al., "RepoQA: Evaluating Long Context Code Understanding", arXiv 2406.06025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from ruler.generation.code_files import LANGUAGES, CodeFiles
from ruler.generation.counting import PieceCounter
from ruler.generation.functions import CodeFunction, functions_in
from ruler.generation.tasks.base import NOISE_SENTENCES, Sample, SampleFailed, Streams, TaskGenerator
from utils.errors import DatasetError

_UNIT = 8  # characters
_MIN_OTHERS = 3  # functions beside the wanted one, however short the prompt
_MAX_MISSES = 60  # functions looked at once they begin not to fit
_QUESTION_TOKENS = 160  # roughly; only decides how long a function may be
_SPARE_TOKENS = 8  # of an answer's room: the end of its text
_SAME = 0.8  # overlap from which on two functions are the same one


@dataclass
class FunctionPool:
    """The functions of a pile of files, read when their file is first drawn.

    Attributes:
        files: The files.
        language: A name of `code_files.LANGUAGES`.
    """

    files: CodeFiles
    language: str
    _read: dict[int, list[CodeFunction]] = field(default_factory=dict)

    def of_file(self, number: int) -> list[CodeFunction]:
        """The functions of a file, in its order."""
        if number not in self._read:
            self._read[number] = functions_in(self.files.files[number], self.language)
        return self._read[number]

    def draw(
        self, random: Random, may_be_asked: Callable[[CodeFunction], bool]
    ) -> tuple[CodeFunction, Iterator[CodeFunction]] | None:
        """A function that may be asked for, and the others in the order in which a prompt takes them.

        Returns:
            None where no function may be asked for.
        """
        order = self._order(random)
        for number in order:
            if choices := [function for function in self.of_file(number) if may_be_asked(function)]:
                wanted = random.choice(choices)
                project = self._project(number)
                rest = sorted(order, key=lambda other: (other != number, self._project(other) != project))
                return wanted, self._shuffled(rest, random.getrandbits(32), without=wanted)
        return None

    def all(self, random: Random) -> Iterator[CodeFunction]:
        """All functions, file by file, in a random order."""
        return self._shuffled(self._order(random), random.getrandbits(32))

    def _order(self, random: Random) -> list[int]:
        order = list(range(len(self.files.files)))
        random.shuffle(order)
        return order

    def _project(self, number: int) -> str:
        return self.files.files[number].path.partition("/")[0]

    def _shuffled(self, order: Sequence[int], seed: int, without: CodeFunction | None = None) -> Iterator[CodeFunction]:
        random = Random(seed)
        for number in order:
            functions = [function for function in self.of_file(number) if function is not without]
            yield from random.sample(functions, len(functions))


@dataclass
class NeedleFunction(TaskGenerator):
    """Generator of the `repoqa` tasks.

    Attributes:
        pool: The functions to draw from.
    """

    pool: FunctionPool = field(default_factory=lambda: FunctionPool(CodeFiles((), {}), "python"))

    def __post_init__(self) -> None:
        self.num_depths = 1
        self._comment = LANGUAGES[self.pool.language].comment
        self._answer: str = self.task.params["answer"]
        # Four functions of this length still leave room, even with few characters a token.
        room = self.max_tokens - self.task.tokens_to_generate - _QUESTION_TOKENS
        self._max_chars = max(int(0.6 * room), 200)
        self._counter: PieceCounter | None = None

    def begin(self, streams: Streams, counter: PieceCounter) -> None:
        self._counter = counter

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        wanted, others = self._draw(streams.random, number)
        chosen = self._choose(wanted, others, size)
        random = Random(streams.random.getrandbits(32))
        random.shuffle(chosen)
        depth = depths[0] if depths else random.random()
        chosen.insert(_place(chosen, depth), wanted)
        pieces = [piece for function in chosen for piece in (self._header(function), f"{function.code}\n")]
        pieces[-1] = pieces[-1].rstrip("\n")
        by_code = self._answer == "code"
        return Sample(
            head=[self.prompt.before(), self.prompt.head()],
            context=pieces,
            tail=[self.prompt.tail(description=wanted.description)],
            outputs=[wanted.code if by_code else wanted.name],
            others={"distractors": [function.code for function in chosen if function is not wanted]} if by_code else {},
        )

    def filler(self, streams: Streams, sample: Sample) -> list[str]:
        words = [word for sentence in NOISE_SENTENCES for word in sentence.split()]
        return [piece for _ in range(12) for piece in (f"\n{self._comment}", *(f" {word}" for word in words))]

    def may_be_asked(self, function: CodeFunction) -> bool:
        """Whether a function can be the wanted one in these prompts."""
        if not function.description or len(function.code) > self._max_chars:
            return False
        if function.name.lower() in function.path.lower():
            return False
        if self._answer != "code" or self._counter is None:
            return True
        return self._counter.count_whole(function.code) <= self.task.tokens_to_generate - _SPARE_TOKENS

    def _draw(self, random: Random, number: int) -> tuple[CodeFunction, Iterator[CodeFunction]]:
        """The wanted function, and others to stand around it, the closest first."""
        drawn = self.pool.draw(random, self.may_be_asked)
        if drawn is None:
            raise DatasetError(
                f"{self.task.name} at {self.max_tokens} tokens: none of the {len(self.pool.files.files)} files has a "
                f"function of at most {self._max_chars} characters with a description that can be asked for; use a "
                "larger --max-seq-length or give a folder with more files"
            )
        return drawn

    def _choose(self, wanted: CodeFunction, others: Iterator[CodeFunction], size: int) -> list[CodeFunction]:
        """Functions of `size` steps in all, the wanted one counted: those that fit, and can stand beside the rest."""
        room = size * _UNIT - self._shown(wanted)
        chosen: list[CodeFunction] = []
        names, misses = {wanted.name.lower()}, 0
        for function in others:
            if misses >= _MAX_MISSES and len(chosen) >= _MIN_OTHERS:
                return chosen
            if len(function.code) > self._max_chars or not goes_with(function, wanted, names):
                continue
            length = self._shown(function)
            if length > room and len(chosen) >= _MIN_OTHERS:
                misses += 1
                continue
            room -= length
            names.add(function.name.lower())
            chosen.append(function)
        if len(chosen) < _MIN_OTHERS:
            raise SampleFailed(f"{len(chosen)} functions go with {wanted.name}")
        if room > self._max_chars:
            raise DatasetError(
                f"{self.task.name} at {self.max_tokens} tokens: all {len(chosen)} functions that go with one another "
                f"have {size * _UNIT - room} characters, {size * _UNIT} are needed; use a smaller --max-seq-length, or "
                "give a folder with more files"
            )
        return chosen

    def _header(self, function: CodeFunction) -> str:
        return f"{self._comment} {function.path}\n"

    def _shown(self, function: CodeFunction) -> int:
        """Characters of a function in a prompt."""
        return len(self._header(function)) + len(function.code) + 1


def goes_with(function: CodeFunction, wanted: CodeFunction, names: set[str]) -> bool:
    """Whether a function leaves the wanted one the only answer; `names` are taken."""
    name, text = wanted.name.lower(), f"{function.path}\n{function.code}".lower()
    if function.name.lower() in names or name in text or function.description == wanted.description:
        return False
    return function.overlap(wanted) < _SAME


def _place(functions: Sequence[CodeFunction], depth: float) -> int:
    """Before which function a further one lies at `depth`, in [0, 1), of the code."""
    offset = depth * sum(len(function.code) for function in functions)
    for place, function in enumerate(functions):
        if offset < len(function.code) / 2:
            return place
        offset -= len(function.code)
    return len(functions)
