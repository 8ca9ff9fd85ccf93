"""How often the answer stands among the selected text, against the budget: no model, only the default's tokenizers.

Memories are held-out code with the questions of `utils.training.data`, and RULER rows. An answer counts as found where
it stands whole, in one stretch of selected text, at a place that proves it: the line that a lookup is about, the lines
after the quoted one, the file's header. A task with several answers wants all of them. The policy `answer` shows
what a budget allows: whole lines of an answer may be too long for it.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ruler.generation.generate import Recipe, generate_rows
from ruler.registry import get_task, parse_lengths
from utils.benchmark.measure import markdown_table
from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.locate import find_checkpoint
from utils.compress.policies.registry import find_policy
from utils.compress.select import Expansion, MemoryText, Question, select
from utils.errors import ConfigError
from utils.intervals import wilson
from utils.model.expand import CharRange, token_offsets
from utils.pretrained import read_tokenizer
from utils.training.config import DataConfig
from utils.training.data.build import draw_examples, read_sources
from utils.training.data.examples import Example
from utils.training.data.lookups import QUESTIONS, find_facts
from utils.training.data.sources import SourceFile

_TIMED_TOKENS = 4096
# Facts whose answer is in the first of their lines; the others' is in the last.
_ANSWER_FIRST = ("method", "comment")


@dataclass(frozen=True, slots=True)
class Case:
    """A memory, a question, and where its answers stand.

    Attributes:
        task: Its task.
        memory: What is selected from.
        question: What is asked, with the answers.
        places: For each answer the ranges of the memory's characters any of which will do.
    """

    task: str
    memory: MemoryText
    question: Question
    places: list[list[CharRange]]

    def is_found_in(self, chosen: Sequence[CharRange]) -> bool:
        """Whether each answer stands whole in one stretch."""
        return all(any(a <= begin and end <= b for begin, end in places for a, b in chosen) for places in self.places)


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure; a table for people, and the figures.

    Raises:
        ConfigError: A number is out of its range, or a task or policy unknown.
    """
    if min(args.num_examples, *args.memory_tokens, *args.parts) < 1 or len(args.memory_tokens) != 2:
        raise ConfigError("--num-examples, --parts and the two numbers of --memory-tokens must be at least 1")
    policies = args.policies.split(",")
    for policy in policies:
        find_policy(policy)
    for task in filter(None, args.tasks.split(",")):
        if task not in _PLACES:
            raise ConfigError(f"--tasks: expected some of {', '.join(_PLACES)}, got {task!r}")
    files = find_checkpoint(None)
    cases: dict[str, list[Case]] = defaultdict(list)
    for case in itertools.chain(_code_cases(args, files), _ruler_cases(args, files)):
        cases[case.task].append(case)
    results = [_measure(task, own, policy, args.parts) for task, own in cases.items() for policy in policies]
    header = ("task", "policy", "examples", *(f"T/{part}" for part in args.parts), f"ms for {_TIMED_TOKENS} tokens")
    return markdown_table(header, [_row(result) for result in results]), {"results": results}


def _measure(task: str, cases: Sequence[Case], policy: str, parts: Sequence[int]) -> dict[str, Any]:
    """Shares of the cases whose answer is found, with 95 % intervals, and how long selecting takes."""
    expansions = [Expansion(share=Fraction(1, part), policy=policy) for part in parts]
    outcomes = [[_try(case, expansion) for expansion in expansions] for case in cases]
    budgets = {}
    for part, of_part in zip(parts, zip(*outcomes, strict=True), strict=True):
        found = sum(is_found for is_found, _ in of_part)
        low, high = wilson(found, len(cases))
        budgets[f"1/{part}"] = {"found": found, "share": found / len(cases), "low": low, "high": high}
    lengths = [len(case.memory.offsets) for case in cases]
    # The quickest of a case's runs: the others waited for the machine.
    quickest_s = [min(seconds for _, seconds in of_case) for of_case in outcomes]
    return {
        "task": task,
        "policy": policy,
        "examples": len(cases),
        "memory_tokens": statistics.median(lengths),
        "budgets": budgets,
        "ms": sum(quickest_s) / sum(lengths) * _TIMED_TOKENS * 1e3,
    }


def _try(case: Case, expansion: Expansion) -> tuple[bool, float]:
    """Whether the answer is found, and the CPU time of selecting, tokenising left out."""
    # A new one: what a memory remembers of its pieces is part of the work.
    memory = MemoryText(case.memory.text, case.memory.offsets)
    began_s = time.process_time()
    (chosen,) = select([memory], case.question, expansion)
    seconds = time.process_time() - began_s
    return case.is_found_in(chosen), seconds


def _row(result: dict[str, Any]) -> tuple[Any, ...]:
    shares = [f"{part['share']:.3f} [{part['low']:.2f}, {part['high']:.2f}]" for part in result["budgets"].values()]
    return result["task"], result["policy"], result["examples"], *shares, f"{result['ms']:.1f}"


def _code_cases(args: argparse.Namespace, files: CheckpointFiles) -> Iterator[Case]:
    tokenizer = read_tokenizer(files.encoder)
    low, high = args.memory_tokens
    data = DataConfig(
        folder="",
        tasks=dict.fromkeys(filter(None, args.tasks.split(",")), args.num_examples),
        memory_tokens=(low, high),
        source="held-out",
        seed=args.seed,
    )
    sources = read_sources(data, to_train=False)
    by_origin = {file.origin: file for file in sources}
    for task, number in data.tasks.items():
        drawn = 0
        for example in draw_examples(task, sources, data):
            offsets = token_offsets(tokenizer, example.memory, len(example.memory))
            # The end of a file cuts an excerpt short.
            if low <= len(offsets) <= high:
                places = [_PLACES[task](example, by_origin[example.source])]
                # The policy `answer` is told the whole lines: an answer alone stands in other places, too.
                begin, end = _line_around(example.memory, places[0][0])
                question = Question(example.question, example.memory[begin:end])
                yield Case(task, MemoryText(example.memory, offsets), question, places)
                drawn += 1
            if drawn == number:
                break


def _lookup_places(example: Example, file: SourceFile) -> list[CharRange]:
    """The line that proves it: facts are found in whole files, for an excerpt may not parse."""
    first = file.text.count("\n", 0, file.text.index(example.memory))
    begins = [0, *(match.end() for match in re.finditer("\n", example.memory))]
    fact = next(
        fact
        for fact in find_facts(file.text)
        if (fact.kind, fact.answer) == (example.kind, example.answer)
        and first <= fact.first <= fact.last < first + len(begins)
        and example.question in [wording.format(*fact.about) for wording in QUESTIONS[fact.kind]]
    )
    line = (fact.first if fact.kind in _ANSWER_FIRST else fact.last) - first
    return [_line_around(example.memory, (begins[line], begins[line]))]


def _header_places(example: Example, file: SourceFile) -> list[CharRange]:
    return [_line_around(example.memory, place) for place in _places(example.memory, f"# file: {example.answer}")]


def _next_places(example: Example, file: SourceFile) -> list[CharRange]:
    """After the quoted line, without empty lines that it begins with."""
    asked, answer = example.question.split("`")[1], example.answer.lstrip("\n")
    wanted = rf"{re.escape(asked)}\s*\n({re.escape(answer)})"
    return [match.span(1) for match in re.finditer(wanted, example.memory)]


def _needle_places(example: Example, file: SourceFile) -> list[CharRange]:
    return _places(example.memory, example.answer)


_PLACES = {
    "lookup": _lookup_places,
    "which_file": _header_places,
    "next_lines": _next_places,
    "needle": _needle_places,
}


def _ruler_cases(args: argparse.Namespace, files: CheckpointFiles) -> Iterator[Case]:
    tokenizer = read_tokenizer(files.encoder)
    for task in filter(None, args.ruler_tasks.split(",")):
        for length in parse_lengths(args.ruler_lengths):
            recipe = Recipe(
                task=task,
                max_seq_length=length,
                tokenizer=str(files.decoder),
                num_samples=args.num_examples,
                seed=args.seed,
                mode="balanced",
            )
            for row in generate_rows(recipe):
                text, begin, end = row["input"], row["context_start"], row["context_end"]
                memory = MemoryText(text[begin:end], token_offsets(tokenizer, text[begin:end], end - begin))
                query = f"{text[:begin]} {text[end:]}{row['answer_prefix']}"
                places = [_places(memory.text, answer) for answer in row["outputs"]]
                answers = tuple(row["outputs"])
                if get_task(task).metric == "part":
                    places, answers = [list(itertools.chain(*places))], answers[:1]
                yield Case(f"{task}, {length}", memory, Question(query, answers), places)


def _line_around(text: str, place: CharRange) -> CharRange:
    """The whole lines of a place, without their end."""
    end = text.find("\n", place[1])
    return text.rfind("\n", 0, place[0]) + 1, end if end >= 0 else len(text)


def _places(text: str, wanted: str) -> list[CharRange]:
    return [match.span() for match in re.finditer(re.escape(wanted), text)]
