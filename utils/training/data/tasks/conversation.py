"""Ask for several things, one after another, about stretches of one to three files with a few notes in them.

The memory is encoded and read once for all its questions: a step of training holds several times the answers that the
single-question tasks give it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from utils.training.data.examples import Example, TaskSources
from utils.training.data.excerpts import excerpt_around, excerpt_range
from utils.training.data.lookups import QUESTIONS, Fact, can_be_asked, find_facts, names_defined
from utils.training.data.notes import draw_note, draw_note_names, indent_at
from utils.training.data.sources import SourceFile


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    num_files = random.choices((1, 2, 3), weights=(5, 3, 2))[0]
    files = [sources.draw_file()[0] for _ in range(num_files)]
    if len({file.path for file in files}) < num_files:
        return None
    budget = sources.draw_chars() // num_files
    parts = [draw_part(random, file, budget) for file in files]
    lines = Counter(line.strip() for part in parts for line in part.lines)
    # A line that another file has too has two next lines.
    said = [(part, fact) for part in parts for fact in part.facts if lines[fact.about[0]] <= 1]
    once = Counter((fact.kind, fact.about) for _, fact in said)
    by_kind: dict[str, list[tuple[Part, Fact]]] = {}
    for part, fact in said:
        if once[fact.kind, fact.about] == 1:
            by_kind.setdefault(fact.kind, []).append((part, fact))
    asked: list[tuple[str, str]] = []
    for kind in random.sample(sorted(by_kind), min(len(by_kind), 4)):
        part, fact = random.choice(by_kind[kind])
        part.keep_together(fact)
        asked.append((random.choice(QUESTIONS[kind]).format(*fact.about), fact.answer))
    if num_files > 1:
        names = Counter(name for part in parts for name in part.names)
        homes = [(name, part.file.path) for part in parts for name in part.names if names[name] == 1]
        for name, path in random.sample(homes, min(len(homes), 2)):
            asked.append((f"Which file defines `{name}`?", path))
    for name in draw_note_names(random, random.randint(0, 3)):
        note, question, value = draw_note(random, name)
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
        memory="\n".join(texts),
        question=question,
        answer=answer,
        source="; ".join(file.origin for file in files),
        kind=f"{len(asked)} questions",
        more=tuple(more),
    )


@dataclass(slots=True)
class Part:
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
        self.lines.insert(place, indent_at(self.lines, place) + note)
        self.closed = {p + (p >= place) for p in self.closed}


def draw_part(random: Random, file: SourceFile, num_chars: int) -> Part:
    """A stretch of a file about something that can be asked, where there is such."""
    lines, facts = file.lines, find_facts(file.text)
    answered = [fact for fact in facts if fact.answer]
    around = random.choice(answered) if answered else None
    if around is not None and sum(map(len, lines[around.first : around.last + 1])) <= num_chars:
        first, stop = excerpt_around(random, lines, around.first, around.last, num_chars)
    else:
        first, stop = excerpt_range(lines, random.randrange(len(lines)), num_chars)
    inside = [fact for fact in facts if can_be_asked(fact, facts, first, stop)]
    shown = [line.rstrip("\n") for line in lines[first:stop]]
    return Part(file, shown, inside, names_defined(lines[first:stop]), first)
