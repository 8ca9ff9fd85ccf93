"""Toy: give the digits that stand behind letters, one after another."""

from __future__ import annotations

import string

from utils.training.data.examples import Example, TaskSources


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    num_pairs = max(1, min(16, sources.draw_chars() // 2))
    letters = random.sample(string.ascii_lowercase[:16], num_pairs)
    digits = random.choices(string.digits, k=num_pairs)
    pairs = list(zip(letters, digits, strict=True))
    memory = "".join(letter + digit for letter, digit in pairs)
    asked = [(f"{letter}?", digit) for letter, digit in random.sample(pairs, num_pairs)]
    (question, answer), *more = asked
    return Example(memory=memory, question=question, answer=answer, more=tuple(more))
