"""Ask which of several files defines something."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.excerpts import excerpt_range
from utils.training.data.lookups import names_defined
from utils.training.data.sources import SourceFile


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    num_files = random.randint(2, 4)
    budget = sources.draw_chars() // num_files
    parts: list[tuple[SourceFile, str, list[str]]] = []
    for _ in range(num_files):
        file, lines = sources.draw_file()
        heads = [i for i, line in enumerate(lines) if line.startswith(("def ", "class "))]
        if not heads:
            return None
        first, stop = excerpt_range(lines, random.choice(heads), budget)
        parts.append((file, "".join(lines[first:stop]), names_defined(lines[first:stop])))
    file, _, names = random.choice(parts)
    once = [name for name in names if sum(name in other for _, other, _ in parts) == 1]
    if len({part[0].path for part in parts}) < num_files or not once:
        return None
    memory = "\n".join(f"# file: {file.path}\n{code.rstrip()}" for file, code, _ in parts)
    question = f"Which file defines `{random.choice(once)}`?"
    return Example(memory=memory, question=question, answer=file.path, source=file.origin)
