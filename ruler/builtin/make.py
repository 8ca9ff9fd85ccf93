"""Writes the built-in data: a haystack text, and questions in the shapes of SQuAD v2.0 and HotpotQA.

Everything is invented here, so the files may be given to anyone, and no model has read them. Every fact belongs to one
named thing and stands in one paragraph, and no name is part of another, so each question has one true answer.

    python -m ruler.builtin.make          # writes the three .json.gz files beside this one; always the same bytes
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from utils.cli import make_parser, run_command


def _list(text: str) -> list[str]:
    """The parts of `text` between bars, or its words where there are none; line ends do not count."""
    joined = text.replace("\n", "")
    return joined.split("|") if "|" in joined else joined.split()


_SEED = 2024
_HAYSTACK_WORDS = 110_000
_NUM_TOWNS = 260
_NUM_FILMS = _NUM_COMPANIES = 400

_ONSETS = _list("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t th tr v w z")
_VOWELS = _list("a e i o u ai ea oa ou")
_CODAS = _list("l ld m n nd r rn rt s st th x")
_PLACE_ENDS = _list("by ford ham haven holm mere mouth ness stead thorpe ton wick")
_FIRST = _list(
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Leon Mira Nils Olga Pavel Rosa Sven Tara Viktor"
)

_SUBJECTS = _list(
    """the old harbour|the night library|a patient carpenter|the village council|the spring market
|a small workshop|the lighthouse keeper|the morning ferry|a retired surveyor|the glass factory|the upper orchard
|the travelling choir|a careful editor|the weather station|the stone quarry|the evening school
|a young clockmaker|the canal company|the paper archive|the mountain hut|the signal tower|a quiet gardener
|the bakery on the corner|the river pilot"""
)
_VERBS = _list(
    """kept a record of|slowly improved|seldom complained about|often spoke of|was proud of|had long argued over
|quietly repaired|never quite understood|was known for|measured|wrote letters about|learned to value
|tried to describe|waited for|shared|carefully copied|borrowed|returned to"""
)
_OBJECTS = _list(
    """the tides|its wooden shelves|the first snow|an unfinished map|the price of rope|the longest winter
|the shape of a good handle|the sound of rain on slate|a promise made in autumn|the way light falls on water
|small and honest mistakes|the habits of swallows|a ledger with a torn cover|the patience of ordinary work
|the distance between two hills|a song that nobody finished|the smell of fresh bread|the use of plain words
|questions without an answer|the weight of a full basket|an argument about bridges|the colour of old brick"""
)
_ENDINGS = _list(
    """|, and nobody minded|, because there was time|, although the road was bad|, as their parents had done
|, which surprised the visitors|, even on holidays|, and that was enough|, or so the story goes
|, when the wind allowed it|, and the reasons were simple"""
)
_OPENINGS = _list("|In those years |After the harvest |Most of all, |It is said that |On clear days |By and large ")
_REMARKS = (
    "Visitors still come to see it in the warmer months.",
    "The archive keeps several drawings from that time.",
    "Older residents like to tell the story in their own way.",
    "Little of this is recorded outside the region.",
    "A short account of it hangs in the town hall.",
    "The details were confirmed by a survey some decades later.",
    "It has changed less than one might think.",
    "School classes learn about it in the third year.",
)


class _Names:
    """Invented names; none is part of another."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._given: list[str] = []

    def place(self) -> str:
        return self._new(lambda: self._syllables(1) + self._random.choice(_PLACE_ENDS))

    def other(self) -> str:
        return self._new(lambda: self._syllables(2))

    def person(self) -> str:
        return f"{self._random.choice(_FIRST)} {self.other()}"

    def _syllables(self, count: int) -> str:
        choice = self._random.choice
        return "".join(choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS) for _ in range(count))

    def _new(self, make: Any) -> str:
        while True:
            name = make().capitalize()
            low = name.lower()
            if not any(low in known or known in low for known in self._given):
                self._given.append(low)
                return str(name)


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
        return f"{random.choice(_SUBJECTS)} {random.choice(_VERBS)} {random.choice(_OBJECTS)}"

    text = random.choice(_OPENINGS) + clause()
    if random.random() < 0.35:
        text += random.choice((", while ", ", but ", "; ")) + clause()
    text += random.choice(_ENDINGS)
    return text[0].upper() + text[1:] + random.choice((".", ".", ".", ".", "!", "?"))


def make_squad(random: Random) -> dict[str, Any]:
    """Articles on invented towns in the shape of SQuAD v2.0."""
    names = _Names(random)
    articles = []
    for number in range(_NUM_TOWNS):
        town = names.place()
        paragraphs = [
            _squad_paragraph(random, f"{number}-{place}", town, *fact)
            for place, fact in enumerate(_town_facts(random, names, town))
        ]
        articles.append({"title": town, "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def _town_facts(random: Random, names: _Names, town: str) -> Iterator[tuple[str, list[tuple[str, str]], str]]:
    """Sentences, their (question, answer) pairs and a question without an answer, a paragraph each."""
    person, year = names.person(), str(random.randint(1104, 1790))
    yield (
        f"{town} was founded in {year} by {person}, who had come with eleven families and a herd of goats. "
        f"Its first houses stood on the southern slope, out of the wind.",
        [(f"In what year was {town} founded?", year), (f"Who founded {town}?", person)],
        f"In what year did {town} build its airport?",
    )
    river, bridge, length = names.other(), names.other(), str(random.randint(61, 980))
    yield (
        f"The river {river} runs through {town} and drives its two mills. It is crossed by the {bridge} Bridge, "
        f"which is {length} metres long and carries both carts and trams.",
        [
            (f"Which river runs through {town}?", river),
            (f"How many metres long is the bridge of {town}?", length),
        ],
        f"How deep is the river at the bridge of {town}?",
    )
    company, product = (
        names.other(),
        random.choice(_list("brass buttons|roof tiles|violin strings|sailcloth|ink|pumps|lamps|felt hats|scales|saws")),
    )
    yield (
        f"The largest employer of {town} is the {company} works, which makes {product}. Half of it leaves by "
        f"ship, the other half is sold at the spring fair of {town}.",
        [
            (f"What does the largest employer of {town} make?", product),
            (f"What is the largest employer of {town}?", company),
        ],
        f"How much does the largest employer of {town} pay in taxes?",
    )
    feast, month = (
        names.other(),
        random.choice(_list("January February March April May June July August September October")),
    )
    yield (
        f"Every {month} the people of {town} hold the feast of {feast}. They carry lanterns to the water and back, and "
        f"the oldest person of {town} puts out the last one.",
        [
            (f"In which month do the people of {town} hold their feast?", month),
            (f"What is the feast of {town} called?", feast),
        ],
        f"How many lanterns are carried at the feast of {town}?",
    )
    scholar, field = (
        names.person(),
        random.choice(_list("botany|algebra|bookbinding|navigation|geology|music|law|astronomy|medicine|optics")),
    )
    yield (
        f"The school of {town} is known for its teaching of {field}. Its best known teacher was {scholar}, who "
        f"stayed for thirty years and left a garden to the school of {town}.",
        [
            (f"For the teaching of what is the school of {town} known?", field),
            (f"Who was the best known teacher of the school of {town}?", scholar),
        ],
        f"Who designed the garden of the school of {town}?",
    )
    opened, line = str(random.randint(1841, 1931)), str(random.randint(12, 97))
    yield (
        f"The railway reached {town} in {opened}. Trains of line {line} stop there twice a day, and the station "
        f"of {town} still has its first clock.",
        [(f"In what year did the railway reach {town}?", opened), (f"Trains of which line stop in {town}?", line)],
        f"Who built the station of {town}?",
    )
    dish, fish = names.other(), random.choice(_list("eel|perch|carp|trout|pike|herring|cod|roach|bream|tench"))
    yield (
        f"Cooks of {town} are proud of a soup called {dish}. It is made of {fish} and dried plums, and in {town} it is "
        f"eaten with the window open.",
        [
            (f"Which fish is in the soup that {town} is proud of?", fish),
            (f"What is the soup called that {town} is proud of?", dish),
        ],
        f"Who invented the soup of {town}?",
    )


def _squad_paragraph(
    random: Random, number: str, town: str, text: str, questions: list[tuple[str, str]], unanswered: str
) -> dict[str, Any]:
    context = f"{text} {' '.join(random.sample(_REMARKS, 3))}"
    items: list[dict[str, Any]] = [
        {
            "question": question,
            "id": f"{number}-{place}",
            "answers": [{"text": answer, "answer_start": context.index(answer)}],
            "is_impossible": False,
        }
        for place, (question, answer) in enumerate(questions)
    ]
    items.append({"question": unanswered, "id": f"{number}-x", "answers": [], "is_impossible": True})
    return {"context": context, "qas": items}


def make_hotpotqa(random: Random) -> list[dict[str, Any]]:
    """Questions that need two paragraphs, in the shape of HotpotQA's distractor setting."""
    names = _Names(random)
    towns = [names.place() for _ in range(80)]
    paragraphs: list[tuple[str, list[str]]] = []
    asked: list[tuple[str, str, list[int]]] = []

    def add(title: str, *sentences: str) -> int:
        # As in the original, every sentence but the first brings its space.
        # Two remarks: ten paragraphs, a question's own, must fit into 1024 tokens of any usual tokenizer.
        remarks = random.sample(_REMARKS, 2)
        paragraphs.append((title, [sentences[0], *(f" {text}" for text in (*sentences[1:], *remarks))]))
        return len(paragraphs) - 1

    def add_person(role: str) -> tuple[str, str, str, int]:
        person, town, year = names.person(), random.choice(towns), str(random.randint(1850, 1989))
        number = add(person, f"{person} was a {role} who was born in {town}.",
                     f"The year of birth of {person} was {year}.",
                     f"As a child {person.split()[0]} collected stones and stamps.")  # fmt: skip
        return person, town, year, number

    for _ in range(_NUM_FILMS):
        title, year = (
            f"The {names.other()} {random.choice(_list('Affair Garden Letter Mirror Road Season'))}",
            random.randint(1920, 2015),
        )
        person, town, _born, of_person = add_person("film director")
        of_film = add(title, f"{title} is a film of {year}.", f"It was directed by {person} and shot in one summer.")
        asked.append((f"In which town was the director of the film {title} born?", town, [of_film, of_person]))
    founded = [random.randint(1700, 1990) for _ in range(_NUM_COMPANIES)]
    last: tuple[str, int, int] | None = None
    for year in founded:
        company = f"{names.other()} {random.choice(_list('Brothers Instruments Mills Shipping Textiles Tools'))}"
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
                "context": [[paragraphs[place][0], paragraphs[place][1]] for place in chosen],
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
    parser = make_parser("Write the built-in RULER data.", "  python -m ruler.builtin.make")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the files."""
    for name, content in make_files().items():
        (args.output_dir / name).write_bytes(content)
        print(f"{args.output_dir / name}: {len(content)} bytes")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
