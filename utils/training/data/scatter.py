"""A memory dealt out over a prompt: several spans, plain text before, between and after them, the question anywhere.

stretches = scatter(random, "import os\\n…")       # in order; together they are the memory
"".join(stretch.text for stretch in stretches)
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from utils.model.markers import wrap

_MOST_TEXTS, _MOST_LINES, _MOST_CUTS = 2, 4, 2


class Stretch(NamedTuple):
    """Whole lines of a memory, with their ends; `is_memory` where they are compressed, else they stay text."""

    text: str
    is_memory: bool

    @property
    def shown(self) -> str:
        """As it stands in a prompt of lines: in markers or not, without the last line's end."""
        text = self.text.removesuffix("\n")
        return wrap(text) if self.is_memory else text


def scatter(random: Random, memory: str) -> tuple[Stretch, ...]:
    """Cut a memory at line ends into spans and text; nothing where it has too few lines for both an end and a cut.

    Up to two runs of one to four lines stay text, and up to two further cuts divide what is compressed: at least two
    stretches in all, at least one of them compressed, none only of white space.
    """
    lines = memory.splitlines(keepends=True)
    if len(lines) < 2:
        return ()
    is_text = [False] * len(lines)
    num_texts = random.randint(0, _MOST_TEXTS)
    for _ in range(num_texts):
        first = random.randrange(len(lines))
        stop = min(first + random.randint(1, _MOST_LINES), len(lines))
        is_text[first:stop] = [True] * (stop - first)
    num_cuts = random.randint(0 if num_texts else 1, _MOST_CUTS)
    cuts = set(random.sample(range(1, len(lines)), min(num_cuts, len(lines) - 1)))
    stretches: list[Stretch] = []
    for number, line in enumerate(lines):
        is_new = number in cuts and not is_text[number]
        if not stretches or is_new or stretches[-1].is_memory == is_text[number]:
            if stretches and not stretches[-1].text.strip():
                # Empty lines are no stretch of their own: they begin the next one.
                line = stretches.pop().text + line
            stretches.append(Stretch(line, not is_text[number]))
        else:
            stretches[-1] = Stretch(stretches[-1].text + line, stretches[-1].is_memory)
    if len(stretches) > 1 and not stretches[-1].text.strip():
        last = stretches.pop()
        stretches[-1] = Stretch(stretches[-1].text + last.text, stretches[-1].is_memory)
    if len(stretches) < 2 or not any(stretch.is_memory for stretch in stretches):
        return ()
    return tuple(stretches)
