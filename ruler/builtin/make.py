"""Writes the built-in data: a haystack text, and questions in the shapes of SQuAD v2.0 and HotpotQA.

Everything is invented here, so the files may be given to anyone, and no model has read them. Every fact belongs to one
named thing and stands in one paragraph, and no name is part of another, so each question has one true answer.

    python -m ruler.builtin.make          # invented.yaml to the three .json.gz files beside it; always the same bytes
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from utils.cli import make_parser, run_command

_SEED = 2024
_HAYSTACK_WORDS = 110_000
_NUM_TOWNS = 260
_NUM_FILMS = _NUM_COMPANIES = 400

_INVENTED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("invented.yaml").read_text(encoding="utf-8"))


class _Names:
    """Invented names; none is part of another."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._given: list[str] = []

    def place(self) -> str:
        return self._new(lambda: self._syllables(1) + self._word("place_ends"))

    def other(self) -> str:
        return self._new(lambda: self._syllables(2))

    def person(self) -> str:
        return f"{self._word('first_names')} {self.other()}"

    def _word(self, kind: str) -> str:
        return self._random.choice(_INVENTED[kind].split())

    def _syllables(self, count: int) -> str:
        return "".join(self._word(part) for _ in range(count) for part in ("onsets", "vowels", "codas"))

    def _new(self, make: Callable[[], str]) -> str:
        while True:
            name = make().capitalize()
            low = name.lower()
            if not any(low in known or known in low for known in self._given):
                self._given.append(low)
                return name


def make_haystack(random: Random) -> dict[str, str]:
    """A long text of plain sentences in paragraphs: {"text": …}."""
    paragraphs, words = [], 0
    while words < _HAYSTACK_WORDS:
        paragraph = " ".join(_haystack_sentence(random) for _ in range(random.randint(4, 9)))
        words += len(paragraph.split())
        paragraphs.append(paragraph)
    return {"text": "\n\n".join(paragraphs)}


def _haystack_sentence(random: Random) -> str:
    def clause() -> str:
        return " ".join(random.choice(_INVENTED[part]) for part in ("subjects", "verbs", "objects"))

    text = random.choice(_INVENTED["openings"]) + clause()
    if random.random() < 0.35:
        text += random.choice((", while ", ", but ", "; ")) + clause()
    text += random.choice(_INVENTED["endings"])
    return text[0].upper() + text[1:] + random.choice((".", ".", ".", ".", "!", "?"))


def make_squad(random: Random) -> dict[str, Any]:
    """Articles on invented towns in the shape of SQuAD v2.0."""
    names = _Names(random)

    def draw(kind: Any) -> str:
        if kind in ("person", "name"):
            return names.person() if kind == "person" else names.other()
        return str(random.randint(*kind) if isinstance(kind[0], int) else random.choice(kind))

    def paragraph(number: str, town: str, fact: dict[str, Any]) -> dict[str, Any]:
        drawn = [draw(kind) for kind in fact["drawn"]]
        context = f"{fact['text'].format(*drawn, town=town)} {' '.join(random.sample(_INVENTED['remarks'], 3))}"
        items: list[dict[str, Any]] = []
        for place, (question, answer) in enumerate((*fact["questions"].items(), (fact["unanswered"], ""))):
            text = answer.format(*drawn)
            items.append(
                {
                    "question": question.format(town=town),
                    "id": f"{number}-{place if text else 'x'}",
                    "answers": [{"text": text, "answer_start": context.index(text)}] if text else [],
                    "is_impossible": not text,
                }
            )
        return {"context": context, "qas": items}

    articles = []
    for number in range(_NUM_TOWNS):
        town = names.place()
        paragraphs = [paragraph(f"{number}-{place}", town, fact) for place, fact in enumerate(_INVENTED["facts"])]
        articles.append({"title": town, "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def make_hotpotqa(random: Random) -> list[dict[str, Any]]:
    """Questions that need two paragraphs, in the shape of HotpotQA's distractor setting."""
    names = _Names(random)
    towns = [names.place() for _ in range(80)]
    paragraphs: list[tuple[str, list[str]]] = []
    asked: list[tuple[str, str, list[int]]] = []

    def add(title: str, *sentences: str) -> int:
        # As in the original, every sentence but the first brings its space.
        # Two remarks: ten paragraphs, a question's own, must fit into 1024 tokens of any usual tokenizer.
        remarks = random.sample(_INVENTED["remarks"], 2)
        paragraphs.append((title, [sentences[0], *(f" {text}" for text in (*sentences[1:], *remarks))]))
        return len(paragraphs) - 1

    def add_person(role: str) -> tuple[str, str, str, int]:
        person, town, year = names.person(), random.choice(towns), str(random.randint(1850, 1989))
        number = add(person, f"{person} was a {role} who was born in {town}.",
                     f"The year of birth of {person} was {year}.",
                     f"As a child {person.split()[0]} collected stones and stamps.")  # fmt: skip
        return person, town, year, number

    for _ in range(_NUM_FILMS):
        title = f"The {names.other()} {random.choice(_INVENTED['film_titles'])}"
        year = random.randint(1920, 2015)
        person, town, _born, of_person = add_person("film director")
        of_film = add(title, f"{title} is a film of {year}.", f"It was directed by {person} and shot in one summer.")
        asked.append((f"In which town was the director of the film {title} born?", town, [of_film, of_person]))
    founded = [random.randint(1700, 1990) for _ in range(_NUM_COMPANIES)]
    last: tuple[str, int, int] | None = None
    for year in founded:
        company = f"{names.other()} {random.choice(_INVENTED['company_titles'])}"
        person, _town, born, of_person = add_person("merchant")
        of_company = add(
            company, f"{company} is a company founded in {year}.", f"It was set up by {person} with borrowed money."
        )
        asked.append((f"In what year was the person born who set up {company}?", born, [of_company, of_person]))
        if last and last[1] != year:
            first = company if year < last[1] else last[0]
            asked.append((f"Which company was founded first, {last[0]} or {company}?", first, [last[2], of_company]))
        last = (company, year, of_company)
    random.shuffle(asked)
    items = []
    for number, (question, answer, gold) in enumerate(asked):
        others = random.sample([place for place in range(len(paragraphs)) if place not in gold], 8)
        chosen = [*gold, *others]
        random.shuffle(chosen)
        items.append(
            {
                "_id": str(number),
                "question": question,
                "answer": answer,
                "supporting_facts": [[paragraphs[place][0], 0] for place in gold],
                "context": [paragraphs[place] for place in chosen],
            }
        )
    return items


def make_files() -> dict[str, bytes]:
    """File name → content of the built-in data."""
    data = {
        "haystack.json": make_haystack(Random(_SEED)),
        "squad.json": make_squad(Random(_SEED + 1)),
        "hotpotqa.json": make_hotpotqa(Random(_SEED + 2)),
    }
    return {
        # Without a time of day, so that the bytes never change.
        f"{name}.gz": gzip.compress(json.dumps(value, ensure_ascii=False).encode(), mtime=0)
        for name, value in data.items()
    }


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    return make_parser("Write the built-in RULER data beside its program.", "  python -m ruler.builtin.make")


def run(args: argparse.Namespace) -> int:
    """Write the files."""
    for name, content in make_files().items():
        path = Path(__file__).with_name(name)
        path.write_bytes(content)
        print(f"{path}: {len(content)} bytes")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
