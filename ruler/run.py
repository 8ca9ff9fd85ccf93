"""`python -m ruler run`: prepare datasets, answer them in several arms, score, and write the report.

    <output>/data/<length>/<task>/        datasets
    <output>/runs/<arm>/                  answers, for example full, memory@8, expand@8, bm25@8
    <output>/report/                      report.html, report.md, report.csv, report.json, pictures

The arms are those of `utils.compress.arms`: what stands in the context's place, at one budget of rows.

Every step goes on where an earlier call of the same command stopped.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from ruler.answering.predict import PredictJob, TaskOutcome, add_backend_arguments, backend_settings, exit_code, predict
from ruler.answering.protocol import BackendSettings
from ruler.generation.generate import MODES, Recipe
from ruler.generation.prepare import DatasetJob, prepare_datasets
from ruler.registry import parse_lengths, resolve_tasks
from ruler.scoring.report import write_report
from utils.cli import print_json
from utils.client.completion import RetryPolicy
from utils.compress.arms import ALL, find_arms
from utils.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python -m ruler run --output out --lengths 1k,2k --num-samples 5 --chunk-size 4,8
  python -m ruler run --output out --lengths 1k --num-samples 20 --arms all --chunk-size 8
  python -m ruler run --output out --lengths 4k,32k --where server --server-url http://127.0.0.1:8000 \\
      --checkpoint models/pair --tokenizer-path models/pair/llm --chunk-size 16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `run`."""
    parser.add_argument("--output", "--output-dir", type=Path, required=True, help="folder for data, runs and report")
    parser.add_argument(
        "--tasks", default="ruler", help="names with commas, or ruler, code, code-extra, all (default: ruler)"
    )
    parser.add_argument("--lengths", default="1k,2k", help="budgets in tokens with commas, 1k = 1024 (default: 1k,2k)")
    parser.add_argument("--num-samples", type=int, default=5, help="rows a task and length (default: 5)")
    parser.add_argument("--mode", choices=MODES, default="balanced", help="of prepare; compat "
                        "gives the reference's rows, which can miss a short budget (default: balanced)")  # fmt: skip
    parser.add_argument("--seed", "--random-seed", type=int, default=42, help="of the samples (default: 42)")
    parser.add_argument("--tokenizer-path", help="measures lengths (default: the local model's own)")
    parser.add_argument("--data-dir", help="folder of the real data files (default: built-in data)")
    parser.add_argument("--workers", type=int, help="processes of prepare (default: one for each core)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    runs = parser.add_argument_group("runs")
    runs.add_argument("--model", help="checkpoint folder, or served name (default: the embedded checkpoint, or the "
                      "only model served)")  # fmt: skip
    runs.add_argument("--where", choices=("local", "server"), default="local", help="who answers (default: local)")
    runs.add_argument("--arms", default="full,memory", help=f"what stands in the context's place, with commas: "
                      f"{', '.join(ALL)}; or all (default: full,memory)")  # fmt: skip
    runs.add_argument("--chunk-size", "--chunk-sizes", default="4,8",
                      help="context tokens for each row of an arm, with commas (default: 4,8)")  # fmt: skip
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do all steps; exit code 3 when rows failed."""
    runs = planned_runs(args)
    data = args.output / "data"
    _prepare(args, runs, data)
    outcomes: list[TaskOutcome] = []
    for name, settings in runs.items():
        logger.info("run %s", name)
        job = PredictJob(
            data_dir=data,
            output_dir=args.output / "runs" / name,
            tasks=resolve_tasks(args.tasks),
            lengths=parse_lengths(args.lengths),
        )
        outcomes += predict(job, settings, RetryPolicy(attempts=args.attempts))
    report = write_report([args.output / "runs" / name for name in runs], args.output / "report")
    if args.json:
        print_json(report)
    else:
        print(args.output / "report" / "report.html")
    return exit_code(outcomes)


def planned_runs(args: argparse.Namespace) -> dict[str, BackendSettings]:
    """The runs that the flags ask for, by name.

    Raises:
        ConfigError: An unknown arm, or a chunk size is no positive number.
    """
    sizes = [size for part in args.chunk_size.split(",") if (size := part.strip())]
    for size in sizes:
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--chunk-size: {size!r} is not a number of tokens: expected for example 4,8")
    return {
        arm.name: backend_settings(
            args,
            name=f"{args.where}-{'memory' if arm.has_latents else 'text'}",
            model=args.model,
            chunk_size=arm.latent_size,
            arm=arm,
        )
        for arm in find_arms(args.arms, [int(size) for size in sizes], ALL)
    }


def _prepare(args: argparse.Namespace, runs: Mapping[str, BackendSettings], data: Path) -> None:
    """Make the datasets that are not there yet.

    Raises:
        DatasetError: One cannot be made, or another dataset lies in the way.
        ConfigError: The pair cannot serve an arm of the runs.
    """
    from ruler.answering.backends import decoder_folder

    if args.tokenizer_path is None and args.where == "server" and args.checkpoint is None:
        raise ConfigError("--tokenizer-path is needed with --where server: name the served model's tokenizer")
    arms = [settings.arm for settings in runs.values() if settings.arm]
    pair = args.checkpoint if args.where == "server" else args.model
    tokenizer = args.tokenizer_path
    # What cannot be answered is not prepared either. Text for a server needs no pair here.
    if tokenizer is None or any(arm.has_latents for arm in arms):
        folder = decoder_folder(pair, arms)
        tokenizer = tokenizer or str(folder)
    jobs = [
        DatasetJob(
            recipe=Recipe(
                task=task,
                max_seq_length=length,
                tokenizer=tokenizer,
                num_samples=args.num_samples,
                seed=args.seed,
                mode=args.mode,
                data_dir=args.data_dir,
            ),
            folder=data / str(length) / task,
        )
        for length in parse_lengths(args.lengths)
        for task in resolve_tasks(args.tasks)
    ]
    _, errors = prepare_datasets(jobs, num_workers=args.workers)
    for name, error in errors.items():
        raise DatasetError(f"{name}: {error}")
