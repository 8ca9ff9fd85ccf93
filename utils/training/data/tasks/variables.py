"""Follow assignments from variable to variable through code."""

from __future__ import annotations

import itertools
import string

from utils.training.data.examples import Example, TaskSources


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    file, code = sources.draw_code()
    lines = code.splitlines()
    names = ["".join(random.choices(string.ascii_lowercase, k=3)) + "_value" for _ in range(random.randint(2, 4))]
    if len(set(names)) < len(names) or any(name in code for name in names):
        return None
    value = str(random.randrange(1000, 100000))
    statements = [f"{names[0]} = {value}", *(f"{b} = {a}" for a, b in itertools.pairwise(names))]
    places = sorted(random.randint(0, len(lines)) for _ in statements)
    for place, statement in reversed(list(zip(places, statements, strict=True))):
        lines.insert(place, statement)
    question = f"Which number does `{random.choice(names)}` hold?"
    return Example(memory="\n".join(lines).strip("\n"), question=question, answer=value, source=file.origin)
