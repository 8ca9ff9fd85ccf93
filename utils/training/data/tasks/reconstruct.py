"""Repeat a stretch of code."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources

_QUESTIONS = ("Repeat the code, character for character.", "Write out the code again, unchanged.", "Repeat it.")


def draw(sources: TaskSources) -> Example | None:
    file, code = sources.draw_code()
    code = code.strip("\n")
    if len(code) < 16:
        return None
    return Example(memory=code, question=sources.random.choice(_QUESTIONS), answer=code, source=file.origin)
