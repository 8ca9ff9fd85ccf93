"""Ask for something that an excerpt of real code says."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.excerpts import excerpt_around
from utils.training.data.lookups import QUESTIONS, can_be_asked, find_facts


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    file, lines = sources.draw_file()
    facts = find_facts(file.text)
    answered = [fact for fact in facts if fact.answer]
    if not answered:
        return None
    kind = random.choice(sorted({fact.kind for fact in answered}))
    fact = random.choice([fact for fact in answered if fact.kind == kind])
    num_chars = sources.draw_chars()
    if sum(map(len, lines[fact.first : fact.last + 1])) > num_chars:
        return None
    first, stop = excerpt_around(random, lines, fact.first, fact.last, num_chars)
    if not can_be_asked(fact, facts, first, stop):
        return None
    question = random.choice(QUESTIONS[kind]).format(*fact.about)
    memory = "".join(lines[first:stop]).strip("\n")
    return Example(memory=memory, question=question, answer=fact.answer, source=file.origin, kind=kind)
