"""Needle in a haystack: sentences that give a key its value, hidden in essays, noise or other needles.

Sizes are words of the essay, or lines of noise or needles. Key names are adjective-noun pairs or uuids, values are
seven-digit numbers or uuids.

Source: RULER, arXiv 2404.06654, section 3.1.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ruler.generation.essay import Essay
from ruler.generation.tasks.base import NOISE, NOISE_SENTENCES, Prompt, Sample, Streams, TaskGenerator
from ruler.generation.words import WordPairs

DEPTHS = [round(number * (100 / 39)) for number in range(40)]  # percent, evenly spread
_NEEDLE = ("One of the special magic {} for", " {} is:", " {}.")

# One answer in all turns the template into the singular.
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))


_Needles = list[tuple[str, str]]  # (key, value), in the order they are hidden


class _Draw(NamedTuple):
    """What the streams decided about one sample."""

    keys: list[str]
    values: list[list[str]]  # of each key
    needles: _Needles


@dataclass
class Niah(TaskGenerator):
    """Generator of the eight needle tasks.

    Attributes:
        essay: The haystack text, where the task hides its needles in one.
        pairs: The adjective-noun pairs that name the keys.
    """

    essay: Essay | None = None
    pairs: WordPairs | None = None

    def __post_init__(self) -> None:
        params = self.task.params
        self._haystack: str = params["haystack"]
        self._needle_values: str = params["value"]
        self._num_keys: int = params["num_keys"]
        self._num_queries: int = params["num_queries"]
        self._num_values: int = params["num_values"]
        self.num_depths = self._num_keys * self._num_values
        if self._haystack == "essay":
            self.step = 500
        else:
            self.step = 5 if self.max_tokens < 4096 else 25
        singular = self._num_queries * self._num_values == 1
        if singular:
            self.prompt = Prompt(self.prompt.task, self.prompt.chat, _SINGULAR)
        # "numbers" in the needles, "number" in a question about one of them
        self._asked = self._needle_values[:-1] if singular else self._needle_values

    def probe(self, streams: Streams, size: int) -> Sample | None:
        if self.essay and self.essay.surely_longer(size, self.max_tokens):
            self._draw_needles(streams)
            streams.random.sample(DEPTHS, self.num_depths)
            streams.random.sample(range(self._num_keys), self._num_queries)
            return None
        return self.sample(streams, size, 0)

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        draw = self._draw_needles(streams)
        context = (self._in_essay if self.essay else self._in_lines)(streams, draw.needles, size, depths)
        asked = streams.random.sample(range(self._num_keys), self._num_queries)
        keys = [draw.keys[index] for index in asked]
        query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
        return Sample(
            head=[self.prompt.before(), self.prompt.head(type_needle_v=self._asked)],
            context=context,
            tail=[self.prompt.tail(type_needle_v=self._asked, query=query)],
            outputs=[value for index in asked for value in draw.values[index]],
        )

    def filler(self, streams: Streams, sample: Sample) -> list[str]:
        if self._haystack == "essay":
            return []
        # A line of needles is as long as a few of noise.
        return list(NOISE_SENTENCES) * (1 if self._haystack == "noise" else 4)

    def smallest_size(self) -> int:
        return 1 if self._haystack == "essay" else self.num_depths

    def _draw_needles(self, streams: Streams) -> _Draw:
        keys, values = [], []
        for _ in range(self._num_keys):
            keys.append(self._draw_word(streams, self.task.params["key"]))
            values.append([self._draw_word(streams, self._needle_values) for _ in range(self._num_values)])
        needles = [(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        return _Draw(keys, values, streams.shuffled(needles))

    def _draw_word(self, streams: Streams, kind: str) -> str:
        if kind == "words":
            assert self.pairs is not None
            return streams.random.choice(self.pairs)
        if kind == "numbers":
            return str(streams.random.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=streams.random.getrandbits(128), version=4))

    def _needle(self, key: str, value: str, before: str = "", behind: str = "") -> list[str]:
        first, middle, last = _NEEDLE
        return [before + first.format(self._needle_values), middle.format(key), last.format(value) + behind]

    def _in_essay(self, streams: Streams, needles: _Needles, size: int, depths: Sequence[float] | None) -> list[str]:
        """Sentences and needles joined by spaces; an empty stretch of sentences still has its space."""
        assert self.essay is not None
        sentences = self.essay.sentence_pieces(size)
        if depths is None:
            depths = [percent / 100 for percent in streams.random.sample(DEPTHS, len(needles))]
        places = sorted(int(len(sentences) * depth) for depth in depths)
        pieces: list[str] = []
        for start, stop, needle in zip([0, *places], places, needles, strict=False):
            pieces += sentences[start:stop] or [" "]
            pieces += self._needle(*needle, before=" ")
        pieces += sentences[places[-1] :] or [" "]
        # Each piece brought the space before it; the first has none.
        return [piece for piece in (pieces[0][1:], *pieces[1:]) if piece]

    def _in_lines(self, streams: Streams, needles: _Needles, size: int, depths: Sequence[float] | None) -> list[str]:
        """Needles between lines of noise or of other needles."""
        if self._haystack == "noise":
            lines = [[NOISE + "\n"]] * size
        else:
            key_kind = self.task.params["key"]
            lines = []
            for _ in range(size):
                key = self._draw_word(streams, key_kind)
                lines.append(self._needle(key, self._draw_word(streams, self._needle_values), behind="\n"))
        places = streams.random.sample(range(size), len(needles)) if depths is None else [int(size * d) for d in depths]
        for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
            lines.insert(place, self._needle(*needle, behind="\n"))
        *rest, last = lines
        # Lines are joined by line ends: the last has none.
        return [piece for line in rest for piece in line] + [*last[:-1], last[-1].removesuffix("\n")]
