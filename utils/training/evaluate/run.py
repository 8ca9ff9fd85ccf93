"""An evaluation as the flags describe it: examples, answers, table and picture."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint.default.assemble import assemble_default_checkpoint
from utils.checkpoint.locate import find_checkpoint
from utils.errors import ConfigError
from utils.files import provenance, sha256_bytes, write_json, write_text
from utils.inference.inference import load_model
from utils.training.config import DataConfig
from utils.training.data.build import draw_examples, read_sources
from utils.training.data.examples import Example
from utils.training.evaluate.arms import FULL, Arm, find_arms
from utils.training.evaluate.evaluator import Evaluator
from utils.training.evaluate.records import RESULT, RecordsFile
from utils.training.evaluate.report import draw, format_table, summarize

REFERENCE = "full, reference"
_NEARLY = 0.9


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Evaluate and write what was asked for; the result as JSON values and as a table."""
    chunk_sizes = _numbers("--chunk-size", args.chunk_sizes, ",")
    examples = _examples(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, _, processor = load_model(args.checkpoint, args.device, dtype=args.dtype)
    arms = find_arms(args.arms.split(","), chunk_sizes, model.config)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["checkpoint_files"] = _stamp(args.checkpoint)
    with RecordsFile(args.output, settings) as records:
        records.take(Evaluator(model, processor, args.batch_size).run(examples, arms, records.done))
        if args.reference:
            start = assemble_default_checkpoint(trained=False) if args.reference == "untrained" else args.reference
            model, _, processor = load_model(start, args.device, dtype=args.dtype)
            done = {(FULL, number) for condition, number in records.done if condition == REFERENCE}
            reference = Evaluator(model, processor, args.batch_size).run(examples, [Arm(FULL)], done)
            records.take({**record, "condition": REFERENCE} for record in reference)
        rows = summarize(records.all, args.seed)
        result = {"settings": settings, "rows": rows, "provenance": provenance()}
        table = format_table(rows)
        if args.output:
            write_text(args.output / "table.md", table + "\n")
            draw(rows, args.output / "result.png")
            write_json(args.output / RESULT, result)
    return result, table


def _stamp(checkpoint: str | None) -> str:
    """Changes when a checkpoint's files do."""
    files = sorted(path for path in find_checkpoint(checkpoint).root.rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in files]
    return sha256_bytes(repr([(str(path), state.st_size, state.st_mtime_ns) for path, state in states]).encode())


def _examples(args: argparse.Namespace) -> list[Example]:
    if args.num_examples < 1 or (args.batch_size is not None and args.batch_size < 1):
        raise ConfigError("--num-examples and --batch-size must be at least 1")
    bounds = _numbers("--memory-tokens", args.memory_tokens, "-")
    data = DataConfig(
        folder="",
        tasks=dict.fromkeys(args.tasks.split(","), args.num_examples),
        memory_tokens=(bounds[0], bounds[-1]),
        source=args.source,
        chars_per_token=args.chars_per_token,
        question_first=float(args.question_first),
        seed=args.seed,
    )
    files = read_sources(data)
    # Whole lines come up to one line short.
    least_chars = _NEARLY * data.memory_tokens[0] * data.chars_per_token
    drawn = (
        itertools.islice(draw_examples(task, files, data, least_chars=least_chars), number)
        for task, number in data.tasks.items()
    )
    return [example for examples in drawn for example in examples]


def _numbers(flag: str, text: str, separator: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        example = separator.join(("4", "8"))
        raise ConfigError(f"{flag}: expected numbers of at least 1, such as {example}, got {text!r}")
    return numbers
