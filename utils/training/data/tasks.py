"""Training tasks: each makes one example from source files, or from nothing but a random generator.

    example = TASKS["lookup"](Material(random, files, SizeRange(shortest=64, longest=256)))
    example.row()           # {"task", "messages", "target"}: loss on the target; {"task", "messages"}: loss on all the
                            # assistant says; {"task", "text"}: loss on the text

Add a task: write its function and name it in `TASKS`. It returns None where the material drawn does not suit it; the
builder then draws again.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable

from utils.errors import ConfigError
from utils.training.data.conversation import conversation
from utils.training.data.examples import Example, Material
from utils.training.data.excerpts import draw_file, excerpt_around, excerpt_range
from utils.training.data.lookups import QUESTIONS, can_be_asked, facts_of, is_askable, names_defined
from utils.training.data.notes import NOUNS, draw_note, draw_note_names, indent_at
from utils.training.data.sources import SourceFile

CHAT = "chat"
_REPEAT = ("Repeat the code, character for character.", "Write out the code again, unchanged.", "Repeat it.")
_REPEAT_WORDS = ("Repeat the words, line by line.", "Repeat it.")
_LIST = ("List all notes and their numbers, in order.", "Which numbers do the notes give? List them in order.")


def reconstruct(material: Material) -> Example | None:
    """Repeat a stretch of code."""
    file, code = material.draw_code()
    code = code.strip("\n")
    if len(code) < 16:
        return None
    question = material.random.choice(_REPEAT)
    return Example(task="reconstruct", memory=code, question=question, answer=code, source=file.origin)


def shuffled(material: Material) -> Example | None:
    """Repeat the words of a stretch of code in an order of chance: nothing but the memory tells which comes next.

    In code most tokens can be guessed from those before them, and a guess teaches nothing about reading.
    """
    file, code = material.draw_code()
    words = code.split()
    if len(words) < 8:
        return None
    material.random.shuffle(words)
    memory = "\n".join(" ".join(words[at : at + 8]) for at in range(0, len(words), 8))
    question = material.random.choice(_REPEAT_WORDS)
    return Example(task="shuffled", memory=memory, question=question, answer=memory, source=file.origin)


def continue_code(material: Material) -> Example | None:
    """Go on with a stretch of code, half as long again as the memory, at most 64 tokens."""
    random = material.random
    num_chars = material.size.draw_chars(random)
    file = draw_file(random, material.files)
    lines = file.text.splitlines(keepends=True)
    start, middle = excerpt_range(lines, random.randrange(len(lines)), num_chars)
    if middle == len(lines):
        return None
    _, stop = excerpt_range(lines, middle, min(num_chars // 2, 200))
    memory, rest = "".join(lines[start:middle]), "".join(lines[middle:stop])
    if not memory.strip() or not rest.strip():
        return None
    return Example(task="continue", memory=memory, question="", answer=rest, source=file.origin)


def lookup(material: Material) -> Example | None:
    """Ask for something that an excerpt of real code says."""
    random = material.random
    file = draw_file(random, material.files)
    facts = facts_of(file.text)
    answered = [fact for fact in facts if fact.answer]
    if not answered:
        return None
    kind = random.choice(sorted({fact.kind for fact in answered}))
    fact = random.choice([fact for fact in answered if fact.kind == kind])
    lines = file.text.splitlines(keepends=True)
    num_chars = material.size.draw_chars(random)
    if sum(map(len, lines[fact.first : fact.last + 1])) > num_chars:
        return None
    first, stop = excerpt_around(random, lines, fact.first, fact.last, num_chars)
    if not can_be_asked(fact, facts, first, stop):
        return None
    question = random.choice(QUESTIONS[kind]).format(*fact.subject)
    memory = "".join(lines[first:stop]).strip("\n")
    return Example(task="lookup", memory=memory, question=question, answer=fact.answer, source=file.origin, kind=kind)


def which_file(material: Material) -> Example | None:
    """Ask which of several files defines something."""
    random = material.random
    num_files = random.randint(2, 4)
    budget = material.size.draw_chars(random) // num_files
    parts: list[tuple[SourceFile, str, list[str]]] = []
    for _ in range(num_files):
        file = draw_file(random, material.files)
        lines = file.text.splitlines(keepends=True)
        heads = [i for i, line in enumerate(lines) if line.startswith(("def ", "class "))]
        if not heads:
            return None
        first, stop = excerpt_range(lines, random.choice(heads), budget)
        parts.append((file, "".join(lines[first:stop]), names_defined(lines[first:stop])))
    paths = [file.path for file, _, _ in parts]
    file, _, names = random.choice(parts)
    once = [name for name in names if sum(name in other for _, other, _ in parts) == 1]
    if len(set(paths)) < num_files or not once:
        return None
    memory = "\n".join(f"# file: {file.path}\n{code.rstrip()}" for file, code, _ in parts)
    question = f"Which file defines `{random.choice(once)}`?"
    return Example(task="which_file", memory=memory, question=question, answer=file.path, source=file.origin)


def needle(material: Material) -> Example | None:
    """Ask for one of a few notes hidden in code."""
    random = material.random
    file, code = material.draw_code()
    lines = code.splitlines()
    names = draw_note_names(random, random.randint(1, 3))
    notes = []
    for name in names:
        note, question, value = draw_note(random, name)
        notes.append((question, value))
        place = random.randint(0, len(lines))
        lines.insert(place, indent_at(lines, place) + note)
    question, value = random.choice(notes)
    memory = "\n".join(lines).strip("\n")
    return Example(task="needle", memory=memory, question=question, answer=value, source=file.origin)


def list_notes(material: Material) -> Example | None:
    """List all of many notes in code: every digit of the answer is a label that no knowledge of code gives away."""
    random = material.random
    file, code = material.draw_code()
    lines = code.splitlines()
    # A note takes about a dozen tokens: as much of it as of the code around it.
    places = sorted(random.randint(0, len(lines)) for _ in range(max(2, min(10, len(code) // 40))))
    listed = []
    for place, name in zip(reversed(places), draw_note_names(random, len(places)), strict=True):
        note, _, value = draw_note(random, name)
        listed.append(f"{name}: {value}")
        lines.insert(place, indent_at(lines, place) + note)
    return Example(
        task="list_notes",
        memory="\n".join(lines).strip("\n"),
        question=random.choice(_LIST),
        answer="\n".join(reversed(listed)),
        source=file.origin,
    )


def next_lines(material: Material) -> Example | None:
    """Write out the lines after a given one: finding a place as in a lookup, with an answer of many tokens."""
    random = material.random
    file, code = material.draw_code()
    lines = code.strip("\n").splitlines()
    stripped = [line.strip() for line in lines]
    usable = [i for i, line in enumerate(stripped[:-1]) if is_askable(line) and stripped.count(line) == 1]
    if not usable:
        return None
    at = random.choice(usable)
    number = min(len(lines) - at - 1, random.randint(1, 6))
    while number and not stripped[at + number]:
        number -= 1  # an answer does not end with empty lines
    if number == 0:
        return None
    answer = "\n".join(lines[at + 1 : at + 1 + number])
    which = "the next line" if number == 1 else f"the next {number} lines"
    question = f"Write out {which} after `{stripped[at]}`."
    memory = "\n".join(lines)
    return Example(task="next_lines", memory=memory, question=question, answer=answer, source=file.origin)


def variables(material: Material) -> Example | None:
    """Follow assignments from variable to variable through code."""
    random = material.random
    file, code = material.draw_code()
    lines = code.splitlines()
    names = ["".join(random.choices(string.ascii_lowercase, k=3)) + "_value" for _ in range(random.randint(2, 4))]
    if len(set(names)) < len(names) or any(name in code for name in names):
        return None
    value = str(random.randrange(1000, 100000))
    statements = [f"{names[0]} = {value}", *(f"{b} = {a}" for a, b in itertools.pairwise(names))]
    places = sorted(random.randint(0, len(lines)) for _ in statements)
    for place, statement in reversed(list(zip(places, statements, strict=True))):
        lines.insert(place, statement)
    question = f"Which number does `{random.choice(names)}` hold?"
    return Example(
        task="variables", memory="\n".join(lines).strip("\n"), question=question, answer=value, source=file.origin
    )


def count(material: Material) -> Example | None:
    """Count a word in a list of words."""
    random = material.random
    num_words = max(4, material.size.draw_chars(random) // 8)
    vocabulary = random.sample(NOUNS, min(len(NOUNS), random.randint(3, 8)))
    words = random.choices(vocabulary, k=num_words)
    word = random.choice(words)
    question = f"How often does `{word}` appear?"
    return Example(task="count", memory=", ".join(words), question=question, answer=str(words.count(word)))


def chat(material: Material) -> Example | None:
    """Answer an ordinary question, which the memory says nothing about, as the decoder did before its training."""
    random = material.random
    if not material.answers:
        raise ConfigError("task chat repeats what a decoder says: it is built for a decoder, not for evaluation")
    question = random.choice(list(material.answers))
    num_chars = material.size.draw_chars(random)
    num_chars //= random.choice((1, 8))  # such questions mostly come without a memory: short ones are nearer to that
    file, code = material.draw_code(max(16, num_chars))
    memory = code.strip("\n")
    if not memory.strip():
        return None
    return Example(task="chat", memory=memory, question=question, answer=material.answers[question], source=file.origin)


def copy_symbols(material: Material) -> Example | None:
    """Toy: repeat random letters."""
    num_chars = material.size.draw_chars(material.random)
    text = "".join(material.random.choices(string.ascii_lowercase[:16], k=num_chars))
    return Example(task="copy_symbols", memory=text, question="r", answer=text)


def find_symbol(material: Material) -> Example | None:
    """Toy: give the digits that stand behind letters, one after another."""
    random = material.random
    num_pairs = max(1, min(16, material.size.draw_chars(random) // 2))
    letters = random.sample(string.ascii_lowercase[:16], num_pairs)
    digits = random.choices(string.digits, k=num_pairs)
    pairs = list(zip(letters, digits, strict=True))
    memory = "".join(letter + digit for letter, digit in pairs)
    (letter, digit), *more = random.sample(pairs, num_pairs)
    return Example(
        task="find_symbol",
        memory=memory,
        question=f"{letter}?",
        answer=digit,
        more=tuple((f"{letter}?", digit) for letter, digit in more),
    )


TASKS: dict[str, Callable[[Material], Example | None]] = {
    "reconstruct": reconstruct,
    "shuffled": shuffled,
    "continue": continue_code,
    "lookup": lookup,
    "next_lines": next_lines,
    "which_file": which_file,
    "needle": needle,
    "list_notes": list_notes,
    "conversation": conversation,
    "variables": variables,
    "count": count,
    CHAT: chat,
    "copy_symbols": copy_symbols,
    "find_symbol": find_symbol,
}
# Tasks that need no source files.
SYMBOL_TASKS = frozenset(("count", "copy_symbols", "find_symbol"))
