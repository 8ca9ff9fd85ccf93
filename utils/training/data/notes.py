"""Notes with numbers, to be hidden in code and asked for."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

_NOTES = (
    ("# The {0} number is {1}.", "What is the {0} number?"),
    ("# {0} access code: {1}", "What is the {0} access code?"),
    ("{2}_ID = {1}", "What is the value of `{2}_ID`?"),
    ("# Remember that the secret of {0} is {1}.", "What is the secret of {0}?"),
)
_ADJECTIVES = ("amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lucid")
NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket", "kettle")


def draw_note_names(random: Random, number: int) -> list[str]:
    """Different names of notes."""
    return random.sample([f"{a} {n}" for a in _ADJECTIVES for n in NOUNS], number)


def draw_note(random: Random, name: str) -> tuple[str, str, str]:
    """A note's line, the question about it, and its value."""
    note, question = random.choice(_NOTES)
    value = str(random.randrange(10 ** random.randint(3, 6), 10**7))
    words = (name, value, name.upper().replace(" ", "_"))
    return note.format(*words), question.format(*words), value


def indent_at(lines: Sequence[str], place: int) -> str:
    """The white space that the line at a place begins with."""
    return lines[place][: len(lines[place]) - len(lines[place].lstrip())] if place < len(lines) else ""
