"""Task examples as JSONL: deterministic, without duplicates, with a report of where they come from.

    build_examples("artifacts/data", {"lookup": 1000}, size=SizeRange(shortest=64, longest=256), source="installed")

writes `lookup.jsonl` and `report.json`. The examples of a task depend on its name, the seed and the sources only, so a
task can be added or enlarged without changing the others.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from utils.errors import ConfigError, DatasetError
from utils.files import sha256_bytes, write_json, write_jsonl
from utils.locks import remove_leftovers, sole_writer
from utils.training.data.examples import Example, Material
from utils.training.data.excerpts import SizeRange
from utils.training.data.sources import SourceFile, held_out_sources, training_sources
from utils.training.data.tasks import SYMBOL_TASKS, TASKS

REPORT_FILE = "report.json"
SYMBOLS = "symbols"
HELD_OUT = "held-out"
_NOTHING: Mapping[str, Any] = {}
# Draws in a row that may fail before a task is given up.
_MAX_FAILURES = 10_000


def read_sources(
    source: str,
    tasks: Iterable[str],
    max_files: int | None = None,
    seed: int = 0,
    package_weights: Mapping[str, int] = _NOTHING,
) -> list[SourceFile]:
    """The files that these tasks draw from: `installed`, `held-out`, a folder; none for `symbols`.

    Args:
        source: Where the files are.
        tasks: What is to be built; tasks over symbols need no files.
        max_files: A random choice of so many files; all by default.
        seed: Of that choice.
        package_weights: Package → how often each of its files stands in the list; once by default.

    Raises:
        ConfigError: An unknown task, or one that needs files where there are none.
        DatasetError: The folder is not there or has too little, or a package that is weighted has no file.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task}: the tasks are {', '.join(TASKS)}")
    need_files = sorted(set(tasks) - SYMBOL_TASKS)
    if not need_files:
        return []
    if source == SYMBOLS:
        raise ConfigError(f"task {need_files[0]} needs source files: choose the source installed or a folder")
    files = list(held_out_sources() if source == HELD_OUT else training_sources(source))
    if not files:
        raise DatasetError(f"{source}: no usable Python file (20 lines or more, valid UTF-8, no very long lines)")
    if max_files is not None and max_files < len(files):
        chosen = sorted(Random(f"{seed} files").sample(range(len(files)), max_files))
        files = [files[index] for index in chosen]
    missing = sorted(set(package_weights) - {file.package for file in files})
    if missing:
        raise DatasetError(f"package_weights: {source} has no file of {missing[0]}")
    return [file for file in files for _ in range(package_weights.get(file.package, 1))]


def draw_examples(
    task: str,
    files: Sequence[SourceFile],
    size: SizeRange,
    seed: int,
    question_first: float = 0.0,
    answers: Mapping[str, str] = _NOTHING,
) -> Iterator[Example]:
    """Endless different examples of one task, a part of them with the question before the memory.

    `answers` are what the task chat draws from: ordinary question → the decoder's answer.

    Raises:
        DatasetError: The sources give no further one.
    """
    material = Material(Random(f"{seed} {task}"), files, size, answers)
    order = Random(f"{seed} {task} order")  # of its own: the examples are the same whatever their order
    seen: set[str | None] = set()
    failures = 0
    while failures < _MAX_FAILURES:
        example = TASKS[task](material)
        key = None if example is None else hash_of(example)
        if example is None or key in seen:
            failures += 1
            continue
        failures = 0
        seen.add(key)
        yield dataclasses.replace(example, question_first=order.random() < question_first)
    raise DatasetError(f"task {task}: no new example in {_MAX_FAILURES} draws after {len(seen)}: ask for fewer")


def build_examples(
    folder: str | Path,
    tasks: Mapping[str, int],
    *,
    size: SizeRange,
    source: str,
    seed: int = 0,
    max_files: int | None = None,
    package_weights: Mapping[str, int] = _NOTHING,
    question_first: float = 0.0,
    answers: Mapping[str, str] = _NOTHING,
) -> dict[str, Any]:
    """Write each task's examples and the report.

    Args:
        folder: Where to.
        tasks: Task → number of examples.
        size: How long memories are.
        source: "installed", "held-out", "symbols" or a folder.
        seed: Of all draws.
        max_files: Draw from a random choice of so many files; from all by default.
        package_weights: Package → how many times as often as others its files are drawn.
        question_first: Part of the examples in which the question stands before the memory.
        answers: For the task chat: ordinary question → the decoder's answer (`answer_questions`).

    Returns:
        The report, as written.

    Raises:
        ConfigError: An unknown task, or another process makes data in the folder.
        DatasetError: The sources give too little.
    """
    folder = Path(folder)
    files = read_sources(source, tasks, max_files, seed, package_weights)
    different = list(dict.fromkeys(files))
    report: dict[str, Any] = {
        "source": source,
        "seed": seed,
        "max_files": max_files,
        "package_weights": dict(package_weights),
        "question_first": question_first,
        "memory_tokens": [size.shortest, size.longest],
        "files": len(different),
        "characters": sum(len(file.text) for file in different),
        "packages": _packages(different),
        "tasks": {},
    }
    with sole_writer(folder) as held:
        if held:
            remove_leftovers(folder, *(f"{task}.jsonl" for task in TASKS), REPORT_FILE)
        for task, number in tasks.items():
            tally = _Tally()
            examples = draw_examples(task, files, size, seed, question_first, answers)
            bar = tqdm(range(number), desc=f"building {task}", unit="example", disable=None)
            path = folder / f"{task}.jsonl"
            write_jsonl(path, (tally.note(next(examples)).row() for _ in bar))
            report["tasks"][task] = {"examples": number, "size_bytes": path.stat().st_size, **tally.summary()}
        write_json(folder / REPORT_FILE, report)
    return report


def hash_of(example: Example) -> str:
    """What makes two examples the same: memory and question."""
    return sha256_bytes(f"{example.memory}\0{example.question}".encode())[:24]


class _Tally:
    """Counts what passes by."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.memory_chars = self.answer_chars = 0

    def note(self, example: Example) -> Example:
        self.kinds[example.kind] += 1
        self.memory_chars += len(example.memory)
        self.answer_chars += len(example.answer)
        return example

    def summary(self) -> dict[str, Any]:
        kinds = {kind: n for kind, n in sorted(self.kinds.items()) if kind}
        return {"memory_chars": self.memory_chars, "answer_chars": self.answer_chars, "kinds": kinds}


def _packages(files: Sequence[SourceFile]) -> dict[str, Any]:
    packages: dict[str, Any] = {}
    for file in files:
        entry = packages.setdefault(file.package, {"licence": file.licence, "files": 0, "characters": 0})
        entry["files"] += 1
        entry["characters"] += len(file.text)
    return packages
