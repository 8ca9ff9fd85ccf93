"""Code tasks of our own: find, place or repeat a function that was planted among real source files.

`code_lookup` asks what a function of a named file returns, where another file has a function of the same name;
`code_where` asks which file defines a function; `code_copy` asks for a function character for character. Sizes are
lines. Every file shows at most a quarter of the prompt, from its beginning, so that a prompt always has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import NamedTuple

from ruler.generation.code_files import CodeFile, CodeFiles
from ruler.generation.tasks.base import NOISE_SENTENCES, Sample, SampleFailed, Streams, TaskGenerator
from utils.errors import DatasetError

_TOKENS_A_LINE = 16  # roughly; only decides how many files a prompt has
_VERBS = ("resolve", "compute", "measure", "select", "derive", "balance", "restore", "collect", "adjust", "estimate")
_ADJECTIVES = ("amber", "brisk", "cobalt", "dusky", "eager", "frosty", "gilded", "hollow", "ivory", "jolly", "keen")
_NOUNS = ("quota", "ledger", "beacon", "lattice", "harbor", "cipher", "margin", "kernel", "signal", "anchor", "basin")
_NUM_DECOYS = 3


class _Function(NamedTuple):
    """A planted function."""

    name: str
    constant: int
    source: str


@dataclass
class _Excerpt:
    """The beginning of a file, in blocks."""

    file: CodeFile
    blocks: list[str]
    planted: list[tuple[int, str]] = field(default_factory=list)  # (before which block, source)

    def pieces(self) -> list[str]:
        at: dict[int, list[str]] = {}
        for place, source in self.planted:
            at.setdefault(place, []).append(source)
        pieces = [f"# ---- {self.file.path} ----\n"]
        for number in range(len(self.blocks) + 1):
            pieces += (f"{source}\n\n" for source in at.get(number, ()))
            pieces += self.blocks[number : number + 1]
        return [*pieces, "\n"]


@dataclass
class CodeTask(TaskGenerator):
    """Generator of the code tasks.

    Attributes:
        files: The pile of files to draw from.
    """

    files: CodeFiles = field(default_factory=lambda: CodeFiles((), {}))

    def __post_init__(self) -> None:
        self._kind: str = self.task.params["kind"]
        self.num_depths = 1
        self._max_lines = max(self.max_tokens // _TOKENS_A_LINE // 4, 12)

    def smallest_size(self) -> int:
        return 4

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        random = streams.random
        functions = self._draw_functions(random)
        excerpts = self._draw_excerpts(random, size)
        depth = depths[0] if depths else random.random()
        target = self._excerpt_at(excerpts, depth)
        path = target.file.path
        if any(path in other.file.path for other in excerpts if other is not target):
            raise SampleFailed(f"the path {path} is part of another one")
        self._plant(target, functions[0], random)
        others = [excerpt for excerpt in excerpts if excerpt is not target]
        for decoy in functions[1:]:
            # A function of the asked name may stand in another file only.
            if choices := others if decoy.name == functions[0].name else excerpts:
                self._plant(random.choice(choices), decoy, random)
        pieces = [piece for excerpt in excerpts for piece in excerpt.pieces()]
        while pieces and not pieces[-1].strip():
            pieces.pop()
        pieces[-1] = pieces[-1].rstrip("\n")
        if any(name in excerpt.file.text for name in {f.name for f in functions} for excerpt in excerpts):
            raise SampleFailed("a planted name is taken")
        answer = {"lookup": str(functions[0].constant), "where": path, "copy": functions[0].source}[self._kind]
        return Sample(
            head=[self.prompt.before(), self.prompt.head()],
            context=pieces,
            tail=[self.prompt.tail(function=functions[0].name, path=path)],
            outputs=[answer],
        )

    def filler(self, streams: Streams, sample: Sample) -> list[str]:
        words = [word for sentence in NOISE_SENTENCES * 3 for word in sentence.split()]
        return ["\n#", *(f" {word}" for word in words)]

    def _draw_functions(self, random: Random) -> list[_Function]:
        """The wanted function and its decoys; for `lookup` the first decoy has its name."""
        names = random.sample(["_".join(words) for words in product(_VERBS, _ADJECTIVES, _NOUNS)], 1 + _NUM_DECOYS)
        if self._kind == "lookup":
            names[1] = names[0]
        constants = random.sample(range(10**6, 10**7), len(names))
        return [
            _Function(name, constant, self._source(random, name, constant))
            for name, constant in zip(names, constants, strict=True)
        ]

    def _source(self, random: Random, name: str, constant: int) -> str:
        if self._kind != "copy":
            return f"def {name}():\n    return {constant}\n"
        factors = random.sample(range(11, 99), 3)
        first, second = random.sample(_NOUNS, 2)
        return (
            f"def {name}({first}, {second}={factors[0]}):\n"
            f"    total = {first} * {factors[1]} + {constant}\n"
            f"    for step in range({second}):\n"
            f"        total -= step % {factors[2]}\n"
            f"    return total"
        )

    def _draw_excerpts(self, random: Random, size: int) -> list[_Excerpt]:
        """Beginnings of files in a random order, `size` lines in all."""
        order = list(self.files.files)
        random.shuffle(order)
        excerpts, left = [], size
        for file in order:
            room = min(left, self._max_lines)
            blocks = []
            for block in file.blocks:
                lines = block.count("\n")
                if lines > room:
                    blocks.append("".join(block.splitlines(keepends=True)[:room]))
                    room = 0
                    break
                blocks.append(block)
                room -= lines
            left -= min(left, self._max_lines) - room
            excerpts.append(_Excerpt(file, [block for block in blocks if block]))
            if left <= 0:
                return excerpts
        raise DatasetError(
            f"{self.task.name} at {self.max_tokens} tokens: the {len(order)} code files have fewer than {size} lines "
            f"that can be shown ({self._max_lines} a file); give a folder with more files"
        )

    def _excerpt_at(self, excerpts: Sequence[_Excerpt], depth: float) -> _Excerpt:
        sizes = [sum(map(len, excerpt.blocks)) for excerpt in excerpts]
        offset = depth * sum(sizes)
        for excerpt, length in zip(excerpts, sizes, strict=True):
            offset -= length
            if offset < 0:
                return excerpt
        return excerpts[-1]

    def _plant(self, excerpt: _Excerpt, function: _Function, random: Random) -> None:
        """Put a function before one of the excerpt's statements, or behind the last complete one."""
        places = [place for place in excerpt.file.statements if place < len(excerpt.blocks)]
        excerpt.planted.append((random.choice(places) if places else 0, function.source))
