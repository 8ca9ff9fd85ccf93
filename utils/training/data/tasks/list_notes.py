"""List all of many notes in code: every digit of the answer is a label that no knowledge of code gives away."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.notes import draw_note, draw_note_names, indent_at

_QUESTIONS = ("List all notes and their numbers, in order.", "Which numbers do the notes give? List them in order.")


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    file, code = sources.draw_code()
    lines = code.splitlines()
    # A note takes about a dozen tokens: as much of it as of the code around it.
    places = sorted(random.randint(0, len(lines)) for _ in range(max(2, min(10, len(code) // 40))))
    listed = []
    for place, name in zip(reversed(places), draw_note_names(random, len(places)), strict=True):
        note, _, value = draw_note(random, name)
        listed.append(f"{name}: {value}")
        lines.insert(place, indent_at(lines, place) + note)
    return Example(
        memory="\n".join(lines).strip("\n"),
        question=random.choice(_QUESTIONS),
        answer="\n".join(reversed(listed)),
        source=file.origin,
    )
