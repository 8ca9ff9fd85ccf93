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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

from utils.model.markers import MEMORY_END, MEMORY_START
from utils.training.data.excerpts import SizeRange, cut_excerpt, draw_file, excerpt_around, excerpt_range
from utils.training.data.lookups import QUESTIONS, Fact, find_facts, is_unambiguous
from utils.training.data.sources import SourceFile

_REPEAT = ("Repeat the code above, character for character.", "Write out the code again, unchanged.", "Repeat it.")
_NOTES = (
    ("# The {0} number is {1}.", "What is the {0} number?"),
    ("# {0} access code: {1}", "What is the {0} access code?"),
    ("{2}_ID = {1}", "What is the value of `{2}_ID`?"),
    ("# Remember that the secret of {0} is {1}.", "What is the secret of {0}?"),
)
_ADJECTIVES = ("amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lucid")
_NOUNS = ("anchor", "bridge", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket", "kettle")
_NO_FILES: tuple[SourceFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training or evaluation example.

    Attributes:
        task: Name in `TASKS`.
        memory: The text that is compressed.
        question: What is asked about it; empty for plain text.
        answer: What the decoder is to write: the target, or the text after the memory.
        source: File and licence behind it.
        kind: Finer kind of the task, for reports.
        more: Questions and answers that follow in the same chat; evaluation asks the first question only.
    """

    task: str
    memory: str
    question: str
    answer: str
    source: str = ""
    kind: str = ""
    more: tuple[tuple[str, str], ...] = ()

    def messages(self, memory: str | None = None) -> list[dict[str, str]]:
        """The chat, with the marked memory or another text in its place."""
        shown = f"{MEMORY_START}{self.memory}{MEMORY_END}" if memory is None else memory
        return [{"role": "user", "content": f"{shown}\n{self.question}"}]

    def row(self) -> dict[str, Any]:
        """The JSONL form."""
        row: dict[str, Any] = {"task": self.task, "kind": self.kind, "source": self.source}
        if self.more:
            turns = [*self.messages(), {"role": "assistant", "content": self.answer}]
            for question, answer in self.more:
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return row | {"messages": turns}
        if self.question:
            return row | {"messages": self.messages(), "target": self.answer}
        return row | {"text": f"{MEMORY_START}{self.memory}{MEMORY_END}{self.answer}"}


@dataclass(frozen=True, slots=True)
class Material:
    """What a task draws from."""

    random: Random
    files: Sequence[SourceFile] = _NO_FILES
    size: SizeRange = field(default_factory=lambda: SizeRange(shortest=64, longest=256))

    def draw_code(self, num_chars: int | None = None) -> tuple[SourceFile, str]:
        """A file and an excerpt of it."""
        file = draw_file(self.random, self.files)
        lines = file.text.splitlines(keepends=True)
        return file, cut_excerpt(self.random, lines, num_chars or self.size.draw_chars(self.random))


def reconstruct(material: Material) -> Example | None:
    """Repeat a stretch of code."""
    file, code = material.draw_code()
    code = code.strip("\n")
    if len(code) < 16:
        return None
    question = material.random.choice(_REPEAT)
    return Example(task="reconstruct", memory=code, question=question, answer=code, source=_origin(file))


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
    return Example(task="continue", memory=memory, question="", answer=rest, source=_origin(file))


def lookup(material: Material) -> Example | None:
    """Ask for something that an excerpt of real code says."""
    random = material.random
    file = draw_file(random, material.files)
    facts = _facts_of(file.text)
    if not facts:
        return None
    kinds = sorted({fact.kind for fact in facts})
    kind = random.choice(kinds)
    fact = random.choice([fact for fact in facts if fact.kind == kind])
    lines = file.text.splitlines(keepends=True)
    num_chars = material.size.draw_chars(random)
    if sum(map(len, lines[fact.first : fact.last + 1])) > num_chars:
        return None
    first, stop = excerpt_around(random, lines, fact.first, fact.last, num_chars)
    if not is_unambiguous(fact, facts, first, stop):
        return None
    question = random.choice(QUESTIONS[kind]).format(*fact.subject)
    memory = "".join(lines[first:stop]).strip("\n")
    return Example(task="lookup", memory=memory, question=question, answer=fact.answer, source=_origin(file), kind=kind)


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
        parts.append((file, "".join(lines[first:stop]), _names_defined(lines[first:stop])))
    paths = [file.path for file, _, _ in parts]
    file, _, names = random.choice(parts)
    once = [name for name in names if sum(name in other for _, other, _ in parts) == 1]
    if len(set(paths)) < num_files or not once:
        return None
    memory = "\n".join(f"# file: {file.path}\n{code.rstrip()}" for file, code, _ in parts)
    question = f"Which file defines `{random.choice(once)}`?"
    return Example(task="which_file", memory=memory, question=question, answer=file.path, source=_origin(file))


def needle(material: Material) -> Example | None:
    """Ask for one of a few notes hidden in code."""
    random = material.random
    file, code = material.draw_code()
    lines = code.splitlines()
    names = _draw_note_names(random, random.randint(1, 3))
    notes = []
    for name in names:
        note, question, value = _draw_note(random, name)
        notes.append((question, value))
        place = random.randint(0, len(lines))
        lines.insert(place, _indent_at(lines, place) + note)
    question, value = random.choice(notes)
    memory = "\n".join(lines).strip("\n")
    return Example(task="needle", memory=memory, question=question, answer=value, source=_origin(file))


def conversation(material: Material) -> Example | None:
    """Ask for several things, one after another, about stretches of one to three files with a few notes in them.

    The memory is encoded and read once for all its questions: a step of training holds several times the answers that
    the single-question tasks give it.
    """
    random = material.random
    num_files = random.choices((1, 2, 3), weights=(5, 3, 2))[0]
    files = [draw_file(random, material.files) for _ in range(num_files)]
    if len({file.path for file in files}) < num_files:
        return None
    budget = material.size.draw_chars(random) // num_files
    parts = [_draw_part(random, file, budget) for file in files]
    lines = Counter(line.strip() for part in parts for line in part.lines)
    # A line that another file has too has two next lines.
    said = [(part, fact) for part in parts for fact in part.facts if lines[fact.subject[0]] <= 1]
    once = Counter((fact.kind, fact.subject) for _, fact in said)
    by_kind: dict[str, list[tuple[_Part, Fact]]] = {}
    for part, fact in said:
        if once[fact.kind, fact.subject] == 1:
            by_kind.setdefault(fact.kind, []).append((part, fact))
    asked: list[tuple[str, str]] = []
    for kind in random.sample(sorted(by_kind), min(len(by_kind), 4)):
        part, fact = random.choice(by_kind[kind])
        part.keep_together(fact)
        asked.append((random.choice(QUESTIONS[kind]).format(*fact.subject), fact.answer))
    if num_files > 1:
        names = Counter(name for part in parts for name in part.names)
        homes = [(name, part.file.path) for part in parts for name in part.names if names[name] == 1]
        for name, path in random.sample(homes, min(len(homes), 2)):
            asked.append((f"Which file defines `{name}`?", path))
    for name in _draw_note_names(random, random.randint(0, 3)):
        note, question, value = _draw_note(random, name)
        random.choice(parts).insert(random, note)
        asked.append((question, value))
    if len(asked) < 2:
        return None
    random.shuffle(asked)
    (question, answer), *more = asked
    texts = ["\n".join(part.lines).strip("\n") for part in parts]
    if num_files > 1:
        texts = [f"# file: {part.file.path}\n{text}" for part, text in zip(parts, texts, strict=True)]
    return Example(
        task="conversation",
        memory="\n".join(texts),
        question=question,
        answer=answer,
        source="; ".join(_origin(file) for file in files),
        kind=f"{len(asked)} questions",
        more=tuple(more),
    )


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
        task="variables", memory="\n".join(lines).strip("\n"), question=question, answer=value, source=_origin(file)
    )


def count(material: Material) -> Example | None:
    """Count a word in a list of words."""
    random = material.random
    num_words = max(4, material.size.draw_chars(random) // 8)
    vocabulary = random.sample(_NOUNS, min(len(_NOUNS), random.randint(3, 8)))
    words = random.choices(vocabulary, k=num_words)
    word = random.choice(words)
    question = f"How often does `{word}` appear?"
    return Example(task="count", memory=", ".join(words), question=question, answer=str(words.count(word)))


def copy_symbols(material: Material) -> Example | None:
    """Toy: repeat random letters."""
    num_chars = material.size.draw_chars(material.random)
    text = "".join(material.random.choices(string.ascii_lowercase[:16], k=num_chars))
    return Example(task="copy_symbols", memory=text, question="r", answer=text)


def find_symbol(material: Material) -> Example | None:
    """Toy: give the digit that stands behind a letter."""
    random = material.random
    num_pairs = max(1, min(16, material.size.draw_chars(random) // 2))
    letters = random.sample(string.ascii_lowercase[:16], num_pairs)
    digits = random.choices(string.digits, k=num_pairs)
    memory = "".join(letter + digit for letter, digit in zip(letters, digits, strict=True))
    asked = random.randrange(num_pairs)
    return Example(task="find_symbol", memory=memory, question=f"{letters[asked]}?", answer=digits[asked])


TASKS: dict[str, Callable[[Material], Example | None]] = {
    "reconstruct": reconstruct,
    "continue": continue_code,
    "lookup": lookup,
    "which_file": which_file,
    "needle": needle,
    "conversation": conversation,
    "variables": variables,
    "count": count,
    "copy_symbols": copy_symbols,
    "find_symbol": find_symbol,
}
# Tasks that need no source files.
SYMBOL_TASKS = frozenset(("count", "copy_symbols", "find_symbol"))


@dataclass(slots=True)
class _Part:
    """A stretch of a file, into which notes are put.

    Attributes:
        file: Where it is from.
        lines: Its lines, without line ends.
        facts: What can be asked about it, lines counted in the file.
        names: Names it defines at the top level.
        first: Its first line in the file.
        closed: Places between lines that belong together, before which nothing may be put.
    """

    file: SourceFile
    lines: list[str]
    facts: list[Fact]
    names: list[str]
    first: int
    closed: set[int] = field(default_factory=set)

    def keep_together(self, fact: Fact) -> None:
        """Put no note between two lines of which a question says that they are neighbours."""
        if fact.last - fact.first == 1:
            self.closed.add(fact.last - self.first)

    def insert(self, random: Random, note: str) -> None:
        """Put a note somewhere."""
        place = random.choice(sorted(set(range(len(self.lines) + 1)) - self.closed))
        self.lines.insert(place, _indent_at(self.lines, place) + note)
        self.closed = {p + (p >= place) for p in self.closed}


def _draw_part(random: Random, file: SourceFile, num_chars: int) -> _Part:
    """A stretch of a file about something that can be asked, where there is such."""
    lines = file.text.splitlines(keepends=True)
    facts = _facts_of(file.text)
    around = random.choice(facts) if facts else None
    if around is not None and sum(map(len, lines[around.first : around.last + 1])) <= num_chars:
        first, stop = excerpt_around(random, lines, around.first, around.last, num_chars)
    else:
        first, stop = excerpt_range(lines, random.randrange(len(lines)), num_chars)
    inside = [fact for fact in facts if is_unambiguous(fact, facts, first, stop)]
    shown = [line.rstrip("\n") for line in lines[first:stop]]
    return _Part(file, shown, inside, _names_defined(lines[first:stop]), first)


def _draw_note_names(random: Random, number: int) -> list[str]:
    return random.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], number)


def _draw_note(random: Random, name: str) -> tuple[str, str, str]:
    """A note's line, the question about it, and its value."""
    note, question = random.choice(_NOTES)
    value = str(random.randrange(10 ** random.randint(3, 6), 10**7))
    words = (name, value, name.upper().replace(" ", "_"))
    return note.format(*words), question.format(*words), value


def _indent_at(lines: Sequence[str], place: int) -> str:
    """The white space that the line at a place begins with."""
    return lines[place][: len(lines[place]) - len(lines[place].lstrip())] if place < len(lines) else ""


@lru_cache(maxsize=4096)
def _facts_of(text: str) -> list[Fact]:
    return find_facts(text)


def _names_defined(lines: Sequence[str]) -> list[str]:
    heads = [line.split("(")[0].split(":")[0].split() for line in lines if line.startswith(("def ", "class "))]
    return [head[1] for head in heads if len(head) == 2]


def _origin(file: SourceFile) -> str:
    return f"{file.package}: {file.path} ({file.licence})"
