"""`python -m utils.training.evaluate`: a checkpoint on held-out code, by generation, at several chunk sizes."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.training.data.examples import Example

TASKS = ("reconstruct", "needle", "lookup", "which_file", "continue")
REFERENCE = "full, reference"


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.training.evaluate`."""
    parser = make_parser(
        "Measure what a checkpoint answers from compressed memory, beside full text and beside truncation.",
        examples="""\
  uv run python -m utils.training.evaluate --num-examples 50 --output artifacts/evaluation/default
  uv run python -m utils.training.evaluate --checkpoint artifacts/training/toy/model --source symbols \\
      --tasks copy_symbols,find_symbol --memory-tokens 4-12 --chars-per-token 1 --chunk-sizes 1,2""",
        prog="python -m utils.training.evaluate",
    )
    parser.add_argument("--checkpoint", help="folder, run folder or hub id; default: the embedded one")
    parser.add_argument("--reference", help="another checkpoint, answering from full text only; `untrained`: the start")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>; default auto")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32; default auto: as stored")
    data = parser.add_argument_group("examples")
    data.add_argument("--tasks", default=",".join(TASKS), help=f"default {','.join(TASKS)}")
    data.add_argument("--num-examples", type=int, default=50, help="of each task; default 50")
    data.add_argument("--memory-tokens", default="192-256", help="shortest and longest, roughly; default 192-256")
    data.add_argument("--chars-per-token", type=float, default=3.2, help="what lengths reckon with; default 3.2")
    data.add_argument("--source", default="held-out", help="held-out, symbols or a folder of code; default held-out")
    data.add_argument("--question-first", action="store_true", help="ask before the memory; default: after it")
    data.add_argument("--seed", type=int, default=1000, help="of the examples; default 1000")
    run = parser.add_argument_group("run")
    run.add_argument("--chunk-sizes", default="4,8,16,32", help="default 4,8,16,32")
    run.add_argument(
        "--batch-size", type=int, help="prompts generated together; default: 8, on a GPU as many as fit, 128 at most"
    )
    run.add_argument("--threads", type=int, help="torch threads; default: torch's choice")
    run.add_argument("--output", type=Path, help="folder for result.json, records.jsonl, table.md and result.png")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    result, records = evaluate(args)
    from utils.files import write_json, write_jsonl, write_text
    from utils.training.evaluate.report import draw, format_table

    table = format_table(result["rows"])
    if args.output:
        write_json(args.output / "result.json", result)
        write_jsonl(args.output / "records.jsonl", records)
        write_text(args.output / "table.md", table + "\n")
        draw(result["rows"], args.output / "result.png")
    if args.json:
        print_json(result)
    else:
        sys.stdout.write(table + "\n")
    return EXIT_OK


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the evaluation that the flags describe; returns the result and its records."""
    chunk_sizes = _numbers("--chunk-sizes", args.chunk_sizes, ",")
    examples = _examples(args)
    import torch

    from utils.checkpoint.default.assemble import assemble_default_checkpoint
    from utils.files import provenance
    from utils.inference.inference import load_model
    from utils.training.evaluate.evaluator import FULL, Condition, Evaluator, all_conditions, check_chunk_sizes
    from utils.training.evaluate.report import summarize

    if args.threads:
        torch.set_num_threads(args.threads)
    model, _, processor = load_model(args.checkpoint, args.device, min(chunk_sizes), dtype=args.dtype)
    check_chunk_sizes(chunk_sizes, model)
    records = list(Evaluator(model, processor, args.batch_size).run(examples, all_conditions(chunk_sizes)))
    if args.reference:
        start = assemble_default_checkpoint(trained=False) if args.reference == "untrained" else args.reference
        model, _, processor = load_model(start, args.device, dtype=args.dtype)
        reference = Evaluator(model, processor, args.batch_size).run(examples, [Condition(FULL)])
        records += [{**record, "condition": REFERENCE} for record in reference]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"settings": settings, "rows": summarize(records, args.seed), "provenance": provenance()}
    return result, records


def _examples(args: argparse.Namespace) -> list[Example]:
    from utils.training.data.build import draw_examples, read_sources
    from utils.training.data.excerpts import SizeRange

    if args.num_examples < 1 or (args.batch_size is not None and args.batch_size < 1):
        raise ConfigError("--num-examples and --batch-size must be at least 1")
    bounds = _numbers("--memory-tokens", args.memory_tokens, "-")
    size = SizeRange(shortest=bounds[0], longest=bounds[-1], chars_per_token=args.chars_per_token)
    tasks = args.tasks.split(",")
    files = read_sources(args.source, tasks)
    first = float(args.question_first)
    return [
        example
        for task in tasks
        for example in itertools.islice(draw_examples(task, files, size, args.seed, first), args.num_examples)
    ]


def _numbers(flag: str, text: str, separator: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        raise ConfigError(f"{flag}: expected numbers such as {separator.join(('4', '8'))}, got {text!r}") from None
    if min(numbers) < 1:
        raise ConfigError(f"{flag}: expected numbers of at least 1, got {text!r}")
    return numbers


if __name__ == "__main__":
    raise SystemExit(main())
