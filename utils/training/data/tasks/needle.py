"""Ask for one of a few notes hidden in code."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.notes import draw_note, draw_note_names, indent_at


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    file, code = sources.draw_code()
    lines = code.splitlines()
    notes = []
    for name in draw_note_names(random, random.randint(1, 3)):
        note, question, value = draw_note(random, name)
        notes.append((question, value))
        place = random.randint(0, len(lines))
        lines.insert(place, indent_at(lines, place) + note)
    question, value = random.choice(notes)
    return Example(memory="\n".join(lines).strip("\n"), question=question, answer=value, source=file.origin)
