"""Go on with a stretch of code, half as long again as the memory, at most 64 tokens: plain text, no question."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.excerpts import excerpt_range


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    num_chars = sources.draw_chars()
    file, lines = sources.draw_file()
    start, middle = excerpt_range(lines, random.randrange(len(lines)), num_chars)
    if middle == len(lines):
        return None
    _, stop = excerpt_range(lines, middle, min(num_chars // 2, 200))
    memory, rest = "".join(lines[start:middle]), "".join(lines[middle:stop])
    if not memory.strip() or not rest.strip():
        return None
    return Example(memory=memory, question="", answer=rest, source=file.origin)
