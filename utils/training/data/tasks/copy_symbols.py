"""Toy: repeat random letters."""

from __future__ import annotations

import string

from utils.training.data.examples import Example, TaskSources


def draw(sources: TaskSources) -> Example | None:
    num_chars = sources.draw_chars()
    text = "".join(sources.random.choices(string.ascii_lowercase[:16], k=num_chars))
    return Example(memory=text, question="r", answer=text)
