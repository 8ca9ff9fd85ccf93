"""Task examples as JSONL: deterministic, without duplicates, with a report of where they come from.

    build_examples(DataConfig(folder="artifacts/data", tasks={"lookup": 1000}))

writes `lookup.jsonl` and `report.json`. The examples of a task depend on its name, the seed and the sources only, so a
task can be added or enlarged without changing the others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from utils.errors import ConfigError, DatasetError
from utils.files import sha256_bytes, write_json, write_jsonl
from utils.locks import remove_leftovers, sole_writer
from utils.training.config import DataConfig
from utils.training.data.examples import Example, TaskSources
from utils.training.data.scatter import scatter
from utils.training.data.sources import INSTALLED, SourceFile, folder_sources, held_out_sources, training_sources
from utils.training.data.tasks.registry import TASKS

REPORT_FILE = "report.json"
SYMBOLS = "symbols"
HELD_OUT = "held-out"
_NOTHING: Mapping[str, str] = {}
# Draws in a row that may fail before a task is given up.
_MAX_FAILURES = 10_000
# Whole lines, and words without their white space, come up to so much short of the length that was drawn.
_LEAST_PART = 2 / 3


def recipe_of(data: DataConfig) -> dict[str, Any]:
    """The settings that decide the examples of a task, as JSON; a report holds them."""
    names = ("source", "seed", "max_files", "package_weights", "question_first", "scattered", "lengths")
    return {name: getattr(data, name) for name in names} | {"memory_tokens": list(data.memory_tokens)}


def read_sources(data: DataConfig, *, to_train: bool = True) -> list[SourceFile]:
    """The files that the tasks draw from, those of weighted packages several times; none where no task needs any.

    Args:
        data: Tasks and their source.
        to_train: Leave out of a folder what is held out for evaluation.

    Raises:
        ConfigError: An unknown task, or one that needs files where there are none.
        DatasetError: The folder is not there or has too little, or a package that is weighted has no file.
    """
    for task in data.tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task}: the tasks are {', '.join(TASKS)}")
    need_files = sorted(task for task in data.tasks if TASKS[task].needs_files)
    if not need_files:
        return []
    source = data.source
    if source == SYMBOLS:
        raise ConfigError(f"task {need_files[0]} needs source files: choose the source installed or a folder")
    if source == HELD_OUT:
        files = list(held_out_sources())
    else:
        files = list(training_sources(source) if to_train or source == INSTALLED else folder_sources(source))
    if not files:
        raise DatasetError(f"{source}: no usable Python file (20 lines or more, valid UTF-8, no very long lines)")
    if data.max_files is not None and data.max_files < len(files):
        chosen = sorted(Random(f"{data.seed} files").sample(range(len(files)), data.max_files))
        files = [files[index] for index in chosen]
    missing = sorted(set(data.package_weights) - {file.package for file in files})
    if missing:
        raise DatasetError(f"package_weights: {source} has no file of {missing[0]}")
    return [file for file in files for _ in range(data.package_weights.get(file.package, 1))]


def draw_examples(
    task: str,
    files: Sequence[SourceFile],
    data: DataConfig,
    answers: Mapping[str, str] = _NOTHING,
    least_chars: float = 0,
) -> Iterator[Example]:
    """Endless different examples of one task, parts of them with the question first, or with a scattered memory.

    `answers` are what the task chat draws from: ordinary question → the decoder's answer. Examples whose memory has
    fewer than `least_chars` are left out: the end of a file cuts an excerpt short, whatever length was drawn.

    Raises:
        DatasetError: The sources give no further one.
    """
    sources = TaskSources(Random(f"{data.seed} {task}"), files, data, answers)
    # Of their own: the examples are the same however they stand in a prompt.
    order, spans = (Random(f"{data.seed} {task} {name}") for name in ("order", "spans"))
    seen: set[str | None] = set()
    failures, least = 0, least_chars
    while failures < _MAX_FAILURES:
        if data.lengths == "log_uniform" and not failures:
            # Kept until an example comes out as long: short ones would else be taken more often than drawn.
            num_chars = dataclasses.replace(sources, num_chars=None).draw_chars()
            sources = dataclasses.replace(sources, num_chars=num_chars)
            least = max(least_chars, _LEAST_PART * num_chars if TASKS[task].fills_length else 0)
        example = TASKS[task].draw(sources)
        key = None if example is None else hash_of(example)
        if example is None or key in seen or len(example.memory) < least:
            failures += 1
            continue
        failures = 0
        seen.add(key)
        example = dataclasses.replace(example, task=task, question_first=order.random() < data.question_first)
        if spans.random() < data.scattered:
            stretches = scatter(spans, example.memory)
            example = dataclasses.replace(example, stretches=stretches, asked_after=spans.randint(0, len(stretches)))
        yield example
    wanted = f" of {least:.0f} characters or more" if least else ""
    raise DatasetError(
        f"task {task}: no new example{wanted} in {_MAX_FAILURES} draws after {len(seen)}: ask for fewer"
        + (", or for shorter memories" if least else "")
    )


def build_examples(data: DataConfig, answers: Mapping[str, str] = _NOTHING) -> dict[str, Any]:
    """Write each task's examples and the report into the data folder.

    Args:
        data: Which examples.
        answers: For the task chat: ordinary question → the decoder's answer (`answer_questions`).

    Returns:
        The report, as written.

    Raises:
        ConfigError: An unknown task, or another process makes data in the folder.
        DatasetError: The sources give too little.
    """
    folder = Path(data.folder)
    files = read_sources(data)
    different = list(dict.fromkeys(files))
    report: dict[str, Any] = {
        **recipe_of(data),
        "files": len(different),
        "characters": sum(len(file.text) for file in different),
        "packages": _packages(different),
        "tasks": {},
    }
    with sole_writer(folder) as held:
        if held:
            remove_leftovers(folder, *(f"{task}.jsonl" for task in TASKS), REPORT_FILE)
        for task, number in data.tasks.items():
            chars: Counter[str] = Counter(memory_chars=0, answer_chars=0)
            kinds: Counter[str] = Counter()
            examples = itertools.islice(draw_examples(task, files, data, answers), number)
            bar = tqdm(examples, total=number, desc=f"building {task}", unit="example", disable=None)
            path = folder / f"{task}.jsonl"
            write_jsonl(path, _rows(bar, chars, kinds))
            entry = {
                "examples": number,
                "size_bytes": path.stat().st_size,
                **chars,
                "kinds": dict(sorted(kinds.items())),
            }
            report["tasks"][task] = entry
        write_json(folder / REPORT_FILE, report)
    return report


def _rows(examples: Iterable[Example], chars: Counter[str], kinds: Counter[str]) -> Iterator[dict[str, Any]]:
    """The examples' rows; what passes by is counted."""
    for example in examples:
        chars.update(memory_chars=len(example.memory), answer_chars=len(example.answer))
        kinds.update([example.kind] if example.kind else [])
        yield example.row()


def hash_of(example: Example) -> str:
    """What makes two examples the same: memory and question."""
    return sha256_bytes(f"{example.memory}\0{example.question}".encode())[:24]


def _packages(files: Sequence[SourceFile]) -> dict[str, Any]:
    packages: dict[str, Any] = {}
    for file in files:
        entry = packages.setdefault(file.package, {"licence": file.licence, "files": 0, "characters": 0})
        entry["files"] += 1
        entry["characters"] += len(file.text)
    return packages
