"""Repeat the words of a stretch of code in an order of chance: nothing but the memory tells which comes next.

In code most tokens can be guessed from those before them, and a guess teaches nothing about reading.
"""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources

_QUESTIONS = ("Repeat the words, line by line.", "Repeat it.")


def draw(sources: TaskSources) -> Example | None:
    file, code = sources.draw_code()
    words = code.split()
    if len(words) < 8:
        return None
    sources.random.shuffle(words)
    memory = "\n".join(" ".join(words[at : at + 8]) for at in range(0, len(words), 8))
    return Example(memory=memory, question=sources.random.choice(_QUESTIONS), answer=memory, source=file.origin)
