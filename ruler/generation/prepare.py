"""`python -m ruler prepare`: generate datasets, many tasks and lengths in one call, in parallel and resumably.

Each dataset is cut into units of work: balanced ones into ranges of rows, the others (whose rows depend on those
before) into one. A finished unit is a file in a hidden folder beside the dataset; when all are there they become the
dataset. A run that was cut off keeps its finished units, a dataset that is complete is left alone.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ruler.generation.generate import (
    Recipe,
    add_recipe_arguments,
    describe,
    generate_rows,
    recipe_from,
    with_enough_length,
)
from ruler.generation.tasks.base import TooShortError
from ruler.layout import read_dataset, read_manifest, rows_path, write_dataset
from ruler.registry import REFERENCE_COMMIT, parse_lengths, resolve_tasks
from utils.cli import print_json
from utils.errors import CodeLlavaError, DatasetError
from utils.files import provenance, read_json, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python -m ruler prepare --output data --lengths 4k,32k --tokenizer-path models/Qwen3-4B --num-samples 100
  python -m ruler prepare --output data --tasks vt,code --lengths 8k --tokenizer-path tokenizer.json --mode balanced
  python -m ruler prepare --output data --lengths 4k --tokenizer-path models/Qwen3-4B --data-dir ruler_data"""

_UNIT_ROWS = 16
_VERSIONS = ("tokenizers", "numpy", "wonderwords", "nltk")


@dataclass(frozen=True, kw_only=True)
class DatasetJob:
    """One dataset to be made.

    Attributes:
        recipe: What its rows are.
        folder: Where it goes.
        subset: Stem of the rows file.
    """

    recipe: Recipe
    folder: Path
    subset: str = "validation"

    @property
    def name(self) -> str:
        """Task and length, for messages."""
        return f"{self.recipe.task} @ {self.recipe.max_seq_length}"

    @property
    def rows_path(self) -> Path:
        """The rows file."""
        return rows_path(self.folder, self.subset)

    @property
    def parts(self) -> Path:
        """Folder of the finished units."""
        return self.folder / f".{self.subset}.parts"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the manifest must say for this to be the same dataset."""
        return describe(self.recipe)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of a job; `made` is False where the dataset was complete, `mean_length` in tokens with the answer."""

    task: str
    max_seq_length: int
    path: str
    num_rows: int
    mean_length: float
    made: bool


class _Unit(NamedTuple):
    job: DatasetJob
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.job.parts / f"{self.start:08d}-{self.stop:08d}.jsonl"


def prepare_datasets(
    jobs: Sequence[DatasetJob], *, num_workers: int | None = None, overwrite: bool = False
) -> tuple[list[Prepared], dict[str, CodeLlavaError]]:
    """Make datasets, or find them made.

    Args:
        jobs: What to make.
        num_workers: Processes; one for each core, at most one for each unit, by default.
        overwrite: Replace other datasets that lie in the way.

    Returns:
        The datasets in the order of `jobs`, and the errors of those that could not be made by `task @ length`.

    Raises:
        ConfigError: A value of a recipe is wrong.
        DatasetError: Another dataset lies in the way, or data is missing.
    """
    complete = {job for job in jobs if _is_complete(job, overwrite)}
    units = [unit for job in jobs if job not in complete for unit in _open_units(job)]
    errors = _make_units(units, num_workers or os.cpu_count() or 1)
    return [_finish(job, job in complete) for job in jobs if job.name not in errors], errors


def _is_complete(job: DatasetJob, overwrite: bool) -> bool:
    """Whether the dataset is there already.

    Raises:
        ConfigError: Its recipe is wrong.
        DatasetError: Another one is there.
    """
    identity = job.identity
    if overwrite or not job.rows_path.exists():
        return False
    advice = "choose another folder, or pass --overwrite"
    manifest = read_manifest(job.folder, job.subset)
    if not manifest:
        raise DatasetError(f"{job.rows_path} was not written by this program: {advice}")
    for name, wanted in identity.items():
        if manifest.get(name) != wanted:
            raise DatasetError(
                f"{job.rows_path} holds another dataset: {name} is {manifest.get(name)!r:.80}, wanted {wanted!r:.80}; "
                f"{advice}"
            )
    read_dataset(job.folder, job.subset)
    return True


def _open_units(job: DatasetJob) -> list[_Unit]:
    """The units of a job that are still to be made; units of another dataset are thrown away."""
    note, total = job.parts / "recipe.json", job.recipe.num_samples
    size = _UNIT_ROWS if job.recipe.balanced else total
    wanted = {**job.identity, "unit_rows": size}
    if note.exists() and read_json(note) != wanted:
        shutil.rmtree(job.parts)
    write_json(note, wanted)
    units = [_Unit(job, start, min(start + size, total)) for start in range(0, total, size)]
    return [unit for unit in units if not unit.path.exists()]


def _make_units(units: Sequence[_Unit], num_workers: int) -> dict[str, CodeLlavaError]:
    """Make all units, here or in worker processes; a failed one does not keep the others from being made."""
    from tqdm import tqdm

    errors: dict[str, CodeLlavaError] = {}
    num_workers = min(num_workers, len(units))
    # disable=None: no bar where stderr is a file.
    with tqdm(total=sum(u.stop - u.start for u in units), desc="prepare", unit="row", disable=None) as bar:
        if num_workers > 1:
            outcomes = _in_processes(units, num_workers, bar.update)
        else:
            outcomes = ((unit, _make_unit(unit, bar.update)) for unit in units)
        for unit, error in outcomes:
            if error and unit.job.name not in errors:
                if isinstance(error, TooShortError):
                    error = with_enough_length(unit.job.recipe, error)
                errors[unit.job.name] = error
                logger.error("%s: %s", unit.job.name, error)
    return errors


def _in_processes(
    units: Sequence[_Unit], num_workers: int, progress: Callable[[int], object]
) -> Iterator[tuple[_Unit, CodeLlavaError | None]]:
    threads = max((os.cpu_count() or 1) // num_workers, 1)
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, os.putenv, ("RAYON_NUM_THREADS", str(threads))) as pool:
        futures = {pool.submit(_make_unit, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                unit = futures[future]
                progress(unit.stop - unit.start)
                yield unit, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make_unit(unit: _Unit, progress: Callable[[int], object] = lambda rows: None) -> CodeLlavaError | None:
    def rows() -> Iterator[dict[str, Any]]:
        for row in generate_rows(unit.job.recipe, unit.start, unit.stop):
            yield row
            progress(1)

    try:
        write_jsonl(unit.path, rows())
    except CodeLlavaError as error:
        return error
    return None


def _finish(job: DatasetJob, complete: bool) -> Prepared:
    """Put the units together as the dataset, unless it is there, and sum it up."""
    if complete:
        _, rows = read_dataset(job.folder, job.subset)
    else:
        rows = [row for file in sorted(job.parts.glob("*.jsonl")) for row in read_jsonl(file)]
        assert len(rows) == job.recipe.num_samples
        manifest = {**job.identity, "reference_commit": REFERENCE_COMMIT[:12], "provenance": provenance(_VERSIONS)}
        write_dataset(job.folder, rows, manifest, job.subset)
        shutil.rmtree(job.parts)
    return Prepared(
        task=job.recipe.task,
        max_seq_length=job.recipe.max_seq_length,
        path=str(job.rows_path),
        num_rows=len(rows),
        mean_length=round(sum(row["length"] for row in rows) / len(rows), 1),
        made=not complete,
    )


# ---- the command ----


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of every command that makes datasets."""
    add_recipe_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--subset", default="validation", help="stem of the rows file (default: validation)")
    group.add_argument("--workers", type=int, help="processes (default: one for each core)")
    group.add_argument("--overwrite", action="store_true", help="replace other datasets that lie in the way")
    group.add_argument("--json", action="store_true", help="print one JSON object in place of the table")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `prepare`."""
    parser.add_argument("--output", "--output-dir", "--save-dir", "--save_dir", type=Path, required=True,
                        help="datasets go to <output>/<length>/<task>/")  # fmt: skip
    parser.add_argument("--tasks", "--task", default="ruler",
                        help="names with commas, or ruler, code, code-extra, all (default: ruler)")  # fmt: skip
    parser.add_argument("--lengths", "--max-seq-length", "--max_seq_length", default="4096",
                        help="budgets in tokens, answer included; 32k = 32768 (default: 4096)")  # fmt: skip
    add_prepare_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `prepare`."""
    jobs = [
        DatasetJob(recipe=recipe_from(args, task, length), folder=args.output / str(length) / task, subset=args.subset)
        for length in parse_lengths(args.lengths)
        for task in resolve_tasks(args.tasks)
    ]
    return run_jobs(jobs, args)


def run_jobs(jobs: Sequence[DatasetJob], args: argparse.Namespace) -> int:
    """Make the datasets and print what became of them.

    Raises:
        DatasetError: A dataset could not be made; the others were.
    """
    started = time.perf_counter()
    prepared, errors = prepare_datasets(jobs, num_workers=args.workers, overwrite=args.overwrite)
    seconds = round(time.perf_counter() - started, 2)
    if args.json:
        failed = {name: str(error) for name, error in errors.items()}
        print_json({"datasets": [asdict(item) for item in prepared], "failed": failed, "seconds": seconds})
    else:
        for item in prepared:
            state = "made" if item.made else "complete"
            print(f"{item.max_seq_length:>8} {item.task:<16} {item.num_rows:>5} rows {item.mean_length:>10.1f} tokens "
                  f"{state:<8} {item.path}")  # fmt: skip
        logger.info("%d datasets in %.1f s", len(prepared), seconds)
    if errors:
        name, error = next(iter(errors.items()))
        tried = [other for other in errors.values() if isinstance(other, TooShortError) and other.num_rows]
        needed = [other.needed or 0 for other in tried]
        enough = f" (a length of {max(needed)} is enough for all)" if 1 < len(errors) == len(needed) else ""
        raise DatasetError(f"{len(errors)} of {len(jobs)} datasets were not made{enough}; the first, {name}: {error}")
    return 0
