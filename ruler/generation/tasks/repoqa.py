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
_MAX_SHARE, _MIN_CHARS = 1 / 6, 200  # of the room: how long a function may be, and how long it may always be
_MEASURED_CHARS = 4000  # of code, by which characters a token are known
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

    def askable(self, random: Random, may_be_asked: Callable[[CodeFunction], bool]) -> Iterator[CodeFunction]:
        """All functions that may be asked for, once each: one of every file, then a second one of every file, …"""
        piles: list[list[CodeFunction]] = []
        for number in self._order(random):
            found = [function for function in self.of_file(number) if may_be_asked(function)]
            if found:
                piles.append(random.sample(found, len(found)))
                yield piles[-1].pop()
        while piles := [pile for pile in piles if pile]:
            for pile in piles:
                yield pile.pop()

    def around(self, random: Random, wanted: CodeFunction | None = None) -> Iterator[CodeFunction]:
        """All functions but the wanted one, file by file: those of its own file first, then those of its project."""
        order = self._order(random)
        if wanted is not None:
            project = _project(wanted.path)
            paths = [file.path for file in self.files.files]
            order.sort(key=lambda number: (paths[number] != wanted.path, _project(paths[number]) != project))
        own = Random(random.getrandbits(32))
        for number in order:
            functions = [function for function in self.of_file(number) if function is not wanted]
            yield from own.sample(functions, len(functions))

    def _order(self, random: Random) -> list[int]:
        order = list(range(len(self.files.files)))
        random.shuffle(order)
        return order


def _project(path: str) -> str:
    return path.partition("/")[0]


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

    def begin(self, streams: Streams, counter: PieceCounter) -> None:
        self._count = counter.count_whole
        code = self.pool.files.files[0].text[:_MEASURED_CHARS]
        around = self.prompt.before() + self.prompt.head() + self.prompt.tail(description="")
        room = self.max_tokens - self.task.tokens_to_generate - self._count(around)
        # Characters of memory and description, roughly.
        self._room = int(room * len(code) / self._count(code))
        self._asked: list[CodeFunction] = []
        self._coming = self._askable(streams.random)

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        wanted = self._wanted(number)
        chosen = self._choose(wanted, self._around(streams.random, wanted), size)
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
        if not function.description or len(function.code) > self._max_chars(function):
            return False
        if function.name.lower() in function.path.lower():
            return False
        return self._answer != "code" or self._count(function.code) <= self.task.tokens_to_generate - _SPARE_TOKENS

    def _max_chars(self, wanted: CodeFunction | None = None) -> int:
        """Characters that a function beside the wanted one, or itself, may have: four leave room for the question."""
        room = self._room - (len(wanted.description) if wanted else 0)
        return max(int(room * _MAX_SHARE), _MIN_CHARS)

    def _askable(self, random: Random) -> Iterator[CodeFunction]:
        """What the rows of a dataset ask for, one after the other."""
        return self.pool.askable(random, self.may_be_asked)

    def _around(self, random: Random, wanted: CodeFunction) -> Iterator[CodeFunction]:
        """What may stand around the wanted function, what comes first before the rest."""
        return self.pool.around(random, wanted)

    def _wanted(self, number: int) -> CodeFunction:
        """What row `number` asks for: every function once, then from the start again."""
        while len(self._asked) <= number and (function := next(self._coming, None)) is not None:
            self._asked.append(function)
        if not self._asked:
            raise DatasetError(
                f"{self.task.name} at {self.max_tokens} tokens: none of the {len(self.pool.files.files)} files has a "
                f"function of at most {self._max_chars()} characters with a description that can be asked for; use a "
                "larger --max-seq-length or give a folder with more files"
            )
        return self._asked[number % len(self._asked)]

    def _choose(self, wanted: CodeFunction, others: Iterator[CodeFunction], size: int) -> list[CodeFunction]:
        """Functions of `size` steps in all, the wanted one counted: those that fit, and can stand beside the rest."""
        room, longest = size * _UNIT - self._shown(wanted), self._max_chars(wanted)
        chosen: list[CodeFunction] = []
        too_long: list[CodeFunction] = []
        names = {wanted.name.lower()}
        for function in others:
            if len(function.code) > longest or not goes_with(function, wanted, names):
                continue
            length = self._shown(function)
            if length > room:
                too_long.append(function)
                if len(too_long) == _MAX_MISSES:
                    break
                continue
            room -= length
            names.add(function.name.lower())
            chosen.append(function)
        else:
            if room > longest:
                raise DatasetError(
                    f"{self.task.name} at {self.max_tokens} tokens: all {len(chosen)} functions that go with one "
                    f"another have {size * _UNIT - room} characters, {size * _UNIT} are needed; use a smaller "
                    "--max-seq-length, or give a folder with more files"
                )
        # Even the smallest sample has some, the shortest.
        for function in sorted(too_long, key=self._shown):
            if len(chosen) < _MIN_OTHERS and function.name.lower() not in names:
                names.add(function.name.lower())
                chosen.append(function)
        if len(chosen) < _MIN_OTHERS:
            raise SampleFailed(f"{len(chosen)} functions go with {wanted.name}")
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
