"""Write out the lines after a given one: finding a place as in a lookup, with an answer of many tokens."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.lookups import is_askable


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    file, code = sources.draw_code()
    lines = code.strip("\n").splitlines()
    stripped = [line.strip() for line in lines]
    usable = [i for i, line in enumerate(stripped[:-1]) if is_askable(line) and stripped.count(line) == 1]
    if not usable:
        return None
    at = random.choice(usable)
    number = min(len(lines) - at - 1, random.randint(1, 6))
    while number and not stripped[at + number]:
        number -= 1  # an answer does not end with empty lines
    if number == 0:
        return None
    which = "the next line" if number == 1 else f"the next {number} lines"
    return Example(
        memory="\n".join(lines),
        question=f"Write out {which} after `{stripped[at]}`.",
        answer="\n".join(lines[at + 1 : at + 1 + number]),
        source=file.origin,
    )
