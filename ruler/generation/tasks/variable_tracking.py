"""Variable tracking: a chain of assignments hidden in noise; the answer is every name that carries the value.

A solved example with shorter names stands before each prompt, its names and value drawn anew for each sample. Sizes
are lines of noise.

Source: RULER, arXiv 2404.06654, section 3.2.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ruler.generation.counting import PieceCounter
from ruler.generation.tasks.base import (
    NOISE,
    NOISE_SENTENCES,
    Prompt,
    Sample,
    SampleFailed,
    Streams,
    TaskGenerator,
    line_pieces,
    one_line,
)
from ruler.generation.templates import chat_template
from utils.errors import DatasetError

_EXAMPLE_MAX_TOKENS = 500
_EXAMPLE_VALUE = "12345"


@dataclass
class VariableTracking(TaskGenerator):
    """Generator of `vt`."""

    is_example: bool = False  # the solved example itself

    def __post_init__(self) -> None:
        params = self.task.params
        self._num_names: int = params["num_hops"] + 1
        self.num_depths = self._num_names
        self._example = ""
        # The example's budget is a small one.
        self.step = 5 if self.max_tokens < 4096 else 10

    def begin(self, streams: Streams, counter: PieceCounter) -> None:
        """Make the solved example: a small sample of the same task, without chat template."""
        maker = VariableTracking(
            task=replace(self.task, tokens_to_generate=0),
            prompt=Prompt(self.task, chat_template("base")),
            max_tokens=_EXAMPLE_MAX_TOKENS,
            is_example=True,
        )
        size = maker.fit(streams, lambda sample: counter.count(sample.pieces))
        for sample in maker.attempts(streams, size, 0):
            text = "".join(sample.pieces)
            text = one_line(text) if self.one_line else text
            if counter.count([text]) <= _EXAMPLE_MAX_TOKENS:
                break
        else:
            raise DatasetError(
                f"{self.task.name}: the solved example needs more than {_EXAMPLE_MAX_TOKENS} tokens of this tokenizer, "
                "not even at its smallest; use one with longer tokens"
            )
        self._example = f"{text} {' '.join(sample.outputs)}\n"
        self.extra_tokens = counter.count([self._example])

    def probe(self, streams: Streams, size: int) -> Sample | None:
        # A probe has no example; its tokens are `extra_tokens`.
        names, value = self._draw_chain(streams, check=False)
        return self._assemble(streams, names, value, size, None)

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        names, value = self._draw_chain(streams)
        sample = self._assemble(streams, names, value, size, depths)
        if self.is_example:
            return sample
        before, head = sample.head
        return replace(sample, head=[before, self._draw_example(streams) + "\n", head])

    def filler(self, streams: Streams, sample: Sample) -> list[str]:
        return list(NOISE_SENTENCES)

    def smallest_size(self) -> int:
        return self._num_names

    def _draw_chain(self, streams: Streams, check: bool = True) -> tuple[list[str], str]:
        """Names of the chain and its value.

        The reference draws a name more while two are equal, takes the surplus for a second, broken chain and fails.
        """
        length = 3 if self.is_example else 5

        def draw_name() -> str:
            return "".join(streams.random.choices(string.ascii_uppercase, k=length))

        names = [draw_name() for _ in range(self._num_names)]
        while len(set(names)) < self._num_names:
            names.append(draw_name())
        values = [
            _EXAMPLE_VALUE if self.is_example else str(streams.numpy.randint(10000, 99999))
            for _ in range(0, len(names), self._num_names)
        ]
        if check and len(names) > self._num_names:
            raise SampleFailed("two names of the chain are equal")
        return list(dict.fromkeys(names)), values[0]

    def _assemble(
        self, streams: Streams, names: list[str], value: str, size: int, depths: Sequence[float] | None
    ) -> Sample:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {source} " for source, name in pairwise(names)]
        lines = [NOISE] * size
        places = streams.random.sample(range(size), len(chain)) if depths is None else [int(size * d) for d in depths]
        for shift, (place, line) in enumerate(zip(sorted(places), chain, strict=True)):
            lines.insert(place + shift, line)
        return Sample(
            head=[self.prompt.before(), self.prompt.head()],
            context=line_pieces(lines),
            tail=[self.prompt.tail(query=value, num_v=self._num_names)],
            outputs=names,
        )

    def _draw_example(self, streams: Streams) -> str:
        """The solved example with new names and a new value."""
        text = self._example
        for name in text.split()[-self._num_names :]:
            text = text.replace(name, "".join(streams.random.choices(string.ascii_uppercase, k=len(name))))
        return text.replace(_EXAMPLE_VALUE, str(streams.numpy.randint(10000, 99999)))
