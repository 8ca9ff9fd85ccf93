"""An evaluation as the flags describe it: examples, answers, table and picture."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint.default.assemble import assemble_default_checkpoint
from utils.checkpoint.locate import find_checkpoint
from utils.compress.arms import FULL, Arm, check_arms, find_arms
from utils.errors import ConfigError
from utils.files import provenance, sha256_bytes, write_json, write_text
from utils.html_report import write_html
from utils.inference.inference import load_model
from utils.training.config import DataConfig
from utils.training.data.build import draw_examples, read_sources
from utils.training.data.examples import Example
from utils.training.data.sources import SourceFile
from utils.training.evaluate.evaluator import Evaluator
from utils.training.evaluate.records import RESULT, RecordsFile
from utils.training.evaluate.report import draw, format_table, summarize

REFERENCE = "full, reference"
_NEARLY = 0.9


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Evaluate and write what was asked for; the result as JSON values and as a table."""
    arms = find_arms(args.arms, _numbers("--chunk-size", args.chunk_sizes, ","))
    examples, places = _draw(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, _, processor = load_model(args.checkpoint, args.device, dtype=args.dtype)
    check_arms(arms, model.config)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"checkpoint_files": _stamp(args.checkpoint), "dtype": str(model.decoder.dtype).removeprefix("torch.")}
    with RecordsFile(args.output, settings) as records:
        evaluated = Evaluator(model, processor, args.batch_size).run(examples, arms, records.done)
        records.take({**record, **places[record["number"]]} for record in evaluated)
        if args.reference:
            start = assemble_default_checkpoint(trained=False) if args.reference == "untrained" else args.reference
            model, _, processor = load_model(start, args.device, dtype=args.dtype)
            done = {(FULL, number) for condition, number in records.done if condition == REFERENCE}
            reference = Evaluator(model, processor, args.batch_size).run(examples, [Arm(FULL)], done)
            records.take({**record, **places[record["number"]], "condition": REFERENCE} for record in reference)
        rows = summarize(records.all)
        result = {"settings": settings, "rows": rows, "provenance": provenance()}
        table = format_table(rows)
        if args.output:
            _write(args.output, result, table)
    return result, table


def _write(output: Path, result: dict[str, Any], table: str) -> None:
    """The result's files; `result.json`, with which the evaluation is whole, comes last."""
    write_text(output / "table.md", table + "\n")
    draw(result["rows"], output / "result.png")
    text = f"# What is kept of a memory\n\n![score over decoder rows](result.png)\n\n{_preface(result)}\n\n{table}\n"
    write_html(text, output, output / "report.html")
    write_json(output / RESULT, result)


def _preface(result: dict[str, Any]) -> str:
    """What a reader must know of the run."""
    settings = result["settings"]
    told = ("checkpoint", "dtype", "num_examples", "memory_tokens", "seed", "source")
    said = ", ".join(f"{name.replace('_', ' ')} {settings[name] or 'default'}" for name in told)
    versions = ", ".join(f"{name} {value}" for name, value in result["provenance"].items())
    return f"Settings: {said}. {versions}."


def _stamp(checkpoint: str | None) -> str:
    """Changes when a checkpoint's files do."""
    files = sorted(path for path in find_checkpoint(checkpoint).root.rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in files]
    return sha256_bytes(repr([(str(path), state.st_size, state.st_mtime_ns) for path, state in states]).encode())


def _draw(args: argparse.Namespace) -> tuple[list[Example], list[dict[str, Any]]]:
    """The examples of all lengths, tasks and seeds, and for each what its records say of that."""
    if args.num_examples < 1 or (args.batch_size is not None and args.batch_size < 1):
        raise ConfigError("--num-examples and --batch-size must be at least 1")
    tasks = dict.fromkeys(args.tasks.split(","), args.num_examples)
    examples: list[Example] = []
    places: list[dict[str, Any]] = []
    files: list[SourceFile] | None = None
    for length, seed in itertools.product(args.memory_tokens.split(","), _seeds(args.seed)):
        bounds = _numbers("--memory-tokens", length, "-")
        data = DataConfig(
            folder="",
            tasks=tasks,
            memory_tokens=(bounds[0], bounds[-1]),
            source=args.source,
            chars_per_token=args.chars_per_token,
            question_first=float(args.question_first),
            seed=seed,
        )
        files = files or read_sources(data, to_train=False)
        # Whole lines come up to one line short.
        least_chars = _NEARLY * data.memory_tokens[0] * data.chars_per_token
        for task, number in data.tasks.items():
            examples += itertools.islice(draw_examples(task, files, data, least_chars=least_chars), number)
            places += [{"length": length, "seed": seed}] * number
    return examples, places


def _seeds(text: str) -> list[int]:
    seeds = [part.strip() for part in str(text).split(",")]
    if not all(seed.removeprefix("-").isdecimal() for seed in seeds):
        raise ConfigError(f"--seed: expected whole numbers with commas between them, such as 1000,1001, got {text!r}")
    return [int(seed) for seed in dict.fromkeys(seeds)]


def _numbers(flag: str, text: str, separator: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        example = separator.join(("4", "8"))
        raise ConfigError(f"{flag}: expected numbers of at least 1, such as {example}, got {text!r}")
    return numbers
