"""Ask for strings hidden in code, to be written out exactly: uuids, hex digests, identifiers and paths.

They have 8 to 36 characters that nothing but the memory tells: what fails first where latents lose spelling.
"""

from __future__ import annotations

import uuid
from random import Random

from utils.training.data.examples import Example, TaskSources
from utils.training.data.notes import draw_note_names, indent_at

SHORTEST, LONGEST = 8, 36
# kind → end of a constant's name, and what a comment calls it
_KINDS = {
    "uuid": ("ID", "request id"),
    "hex": ("DIGEST", "checksum"),
    "identifier": ("SYMBOL", "symbol"),
    "path": ("PATH", "path"),
}
_LINES = (
    ('{constant} = "{value}"', "What is the value of `{constant}`? Write it out exactly."),
    ("# {word} of the {name}: {value}", "What is the {word} of the {name}? Write it out exactly."),
)
_ENDINGS = (".py", ".json", ".yaml", ".txt", ".log", ".h", "")
_MOST_STRINGS = 4
_CHARS_A_STRING = 150


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    file, code = sources.draw_code()
    lines = code.splitlines()
    asked = []
    number = random.randint(1, max(1, min(_MOST_STRINGS, len(code) // _CHARS_A_STRING)))
    for name in draw_note_names(random, number):
        kind = random.choice(list(_KINDS))
        suffix, word = _KINDS[kind]
        value = draw_string(random, kind)
        if value in code:
            return None
        line, question = random.choice(_LINES)
        said = {"name": name, "word": word, "value": value, "constant": f"{name} {suffix}".upper().replace(" ", "_")}
        place = random.randint(0, len(lines))
        lines.insert(place, indent_at(lines, place) + line.format(**said))
        asked.append((kind, question.format(**said), value))
    random.shuffle(asked)
    (kind, question, value), *more = asked
    return Example(
        memory="\n".join(lines).strip("\n"),
        question=question,
        answer=value,
        source=file.origin,
        kind=kind,
        more=tuple((question, value) for _, question, value in more),
    )


def draw_string(random: Random, kind: str) -> str:
    """A string of a kind, of `SHORTEST` to `LONGEST` characters."""
    if kind == "uuid":
        return str(uuid.UUID(int=random.getrandbits(128), version=4))
    if kind == "hex":
        digits = random.choice((8, 12, 16, 20, 32))
        return f"{random.getrandbits(4 * digits):0{digits}x}"
    while True:
        words = [_word(random) for _ in range(random.randint(2, 5))]
        if kind == "path":
            text = random.choice(("/", "", "./")) + "/".join(words) + random.choice(_ENDINGS)
        else:
            text = random.choice(("_".join(words), "".join(map(str.title, words))))
            text += random.choice(("", str(random.randrange(100))))
        if SHORTEST <= len(text) <= LONGEST:
            return text


def _word(random: Random) -> str:
    """One to three syllables that mean nothing."""
    return "".join(
        random.choice("bcdfghjklmnprstvwxz") + random.choice("aeiouy") + random.choice(("", "", "n", "r", "st"))
        for _ in range(random.randint(1, 3))
    )
