"""`python -m ruler predict`: answer the rows of prepared datasets, resumably.

A run folder holds, for each length, one prediction file a task and a manifest that says what made them. Starting the
same command again asks only what is missing; rows that failed are listed in `<task>.failed.jsonl` and asked again.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ruler.answering.predictions import DataRow, PredictionFile
from ruler.answering.protocol import BACKENDS, DEFAULT_SERVER_URL, Backend, BackendSettings
from ruler.answering.runner import FailedRow, ask
from ruler.layout import MANIFEST, check_same, claim_run_folder, dataset_tasks, length_folders, read_dataset
from ruler.registry import get_task, parse_lengths, resolve_tasks
from utils.cli import EXIT_FAILED_ROWS, EXIT_OK, print_json
from utils.client.completion import RetryPolicy, Sampling
from utils.errors import ConfigError
from utils.files import provenance, write_json, write_jsonl
from utils.flags import add_expand_flags, expansion

EXAMPLES = """\
  python -m ruler predict --data-dir out/data --output out/runs/memory --backend local-memory --chunk-size 8
  python -m ruler predict --data-dir out/data --output out/runs/text --backend server-text \\
      --server-url http://127.0.0.1:8000 --model my-model --concurrency 16"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """What became of one task at one length."""

    length: int | None
    task: str
    rows: int
    answered: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictJob:
    """Which rows to answer and where the answers go.

    Attributes:
        data_dir: Dataset root (with or without length folders).
        output_dir: Run folder, laid out alike.
        tasks: Task names; None takes all there are.
        lengths: Names of length folders; None takes all there are.
        subset: Stem of the rows files.
        max_rows: Only the first rows of each task.
        chunk_index, num_chunks: Answer only one of several equal slices, kept in a file of its own.
        keep_input: Repeat each prompt in its prediction, as the reference does.
    """

    data_dir: Path
    output_dir: Path
    tasks: Sequence[str] | None = None
    lengths: Sequence[int] | None = None
    subset: str = "validation"
    max_rows: int | None = None
    chunk_index: int = 0
    num_chunks: int = 1
    keep_input: bool = False


def predict(job: PredictJob, settings: BackendSettings, retry: RetryPolicy | None = None) -> list[TaskOutcome]:
    """Answer all missing rows of a job.

    Returns:
        One outcome for each task at each length; failed rows are counted and lie beside the predictions.

    Raises:
        DatasetError: A dataset is missing or broken, or the run folder belongs to other settings or other rows.
        ServerError: The server is not there or refuses every request; what was answered is kept.
    """
    folders = length_folders(job.data_dir, job.lengths)
    plan = [(folder, dataset_tasks(folder, job.subset, job.tasks)) for folder in folders]
    return asyncio.run(_Prediction(job, settings, retry or RetryPolicy()).answer(plan))


class _Prediction:
    """One call of `predict`; its model is loaded when the first missing row turns up."""

    def __init__(self, job: PredictJob, settings: BackendSettings, retry: RetryPolicy) -> None:
        self._job = job
        self._settings = settings
        self._retry = retry
        self._backend: Backend | None = None

    async def answer(self, plan: list[tuple[Path, list[str]]]) -> list[TaskOutcome]:
        """Answer all tasks of all length folders."""
        try:
            return [await self._task(folder, task) for folder, tasks in plan for task in tasks]
        finally:
            if self._backend is not None:
                await self._backend.close()

    async def _task(self, folder: Path, task: str) -> TaskOutcome:
        job = self._job
        target = job.output_dir / folder.name if folder != job.data_dir else job.output_dir
        manifest = claim_run_folder(target, self._settings.identity(), job.subset)
        data, rows = _read_rows(job, folder / task)
        manifest["data"][task] = data
        write_json(target / MANIFEST, manifest)
        name = task if job.num_chunks == 1 else f"{task}-{job.chunk_index}"
        failed: list[FailedRow] = []
        with PredictionFile(target / f"{name}.jsonl", rows) as file:
            todo = [row for row in file.missing if job.max_rows is None or row.number < job.max_rows]
            if todo:
                failed = await self._ask(await self._ready_backend(target, manifest), file, todo, task)
        failures = target / f"{name}.failed.jsonl"
        if failed:
            write_jsonl(failures, (asdict(failure) for failure in failed))
        else:
            failures.unlink(missing_ok=True)
        length = int(folder.name) if folder.name.isdecimal() else data.get("max_seq_length")
        answered = len(todo) - len(failed)
        return TaskOutcome(length=length, task=task, rows=len(rows), answered=answered, failed=len(failed))

    async def _ready_backend(self, target: Path, manifest: dict[str, Any]) -> Backend:
        """The backend, started; what it found out must agree with what a folder's other predictions were made with."""
        if self._backend is None:
            self._backend = await start_backend(self._settings, self._retry)
        details = self._backend.details
        check_same(manifest.get("backend", details), details, target)
        write_json(target / MANIFEST, {**manifest, "backend": details, "provenance": provenance()})
        return self._backend

    async def _ask(self, backend: Backend, file: PredictionFile, rows: list[DataRow], task: str) -> list[FailedRow]:
        from tqdm import tqdm

        config = get_task(task)
        # disable=None: no bar where stderr is a file.
        with tqdm(total=len(file.rows), initial=len(file.rows) - len(rows), desc=task, unit="row", disable=None) as bar:
            return await ask(
                backend,
                file,
                rows,
                max_tokens=config.tokens_to_generate,
                measure=needle_depths if config.family == "niah" else lambda row: {},
                keep_input=self._job.keep_input,
                on_row=bar.update,
            )


async def start_backend(settings: BackendSettings, retry: RetryPolicy) -> Backend:
    """Open a backend and see that it is ready; a server that is not running is an error at once."""
    from ruler.answering.backends import open_backend

    backend = open_backend(settings, retry)
    try:
        await backend.start()
    except BaseException:
        await backend.close()
        raise
    return backend


def _read_rows(job: PredictJob, folder: Path) -> tuple[dict[str, Any], list[DataRow]]:
    """What identifies the rows, and the job's share of them."""
    manifest, fields = read_dataset(folder, job.subset)
    rows = [DataRow(number=number, fields=row) for number, row in enumerate(fields)]
    size = -(-len(rows) // job.num_chunks)
    kept = ("rows_sha256", "max_seq_length", "mode", "seed")
    data = {"num_rows": len(rows), **{name: manifest[name] for name in kept if name in manifest}}
    return data, rows[job.chunk_index * size : (job.chunk_index + 1) * size]


def needle_depths(row: DataRow) -> dict[str, list[float]]:
    """Where the wanted needles lie in their context, 0 (start) to 1 (end), in the order of `outputs`."""
    text = row.fields["input"]
    start, end = row.fields.get("context_start", 0), row.fields.get("context_end", len(text))
    places = [text.find(f" is: {value}.", start, end) for value in row.fields["outputs"]]
    return {"depths": [round((place - start) / (end - start), 4) for place in places]} if min(places) >= 0 else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `predict`."""
    parser.add_argument("--data-dir", type=Path, required=True, help="dataset root: [<length>/]<task>/<subset>.jsonl")
    parser.add_argument("--output", "--output-dir", type=Path, required=True, help="run folder for the predictions")
    parser.add_argument(
        "--tasks", help="task names with commas, or ruler, code, code-extra, all (default: what is prepared)"
    )
    parser.add_argument("--lengths", help="with commas, 1k = 1024 (default: what is prepared)")
    parser.add_argument("--subset", default="validation", help="stem of the rows files (default: validation)")
    parser.add_argument("--max-rows", type=int, help="answer only the first rows of each task (default: all)")
    parser.add_argument("--keep-input", action="store_true", help="repeat each prompt in its prediction")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    backend = parser.add_argument_group("backend")
    backend.add_argument(
        "--backend", choices=BACKENDS, default="local-memory", help="who answers (default: %(default)s)"
    )
    backend.add_argument("--model", help="served name, or model or checkpoint folder (default: the only one served, or "
                         "the embedded default checkpoint)")  # fmt: skip
    backend.add_argument("--chunk-size", type=int, help="encoder tokens a latent (default: the checkpoint's)")
    add_backend_arguments(parser)
    add_expand_flags(parser)


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that shape a backend without choosing it; `run` has them too."""
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--api", choices=("completions", "chat"), default="completions",
                        help="continue the prompt, or make it a user turn (default: %(default)s)")  # fmt: skip
    prompt.add_argument("--system-prompt", default="", help="what a chat begins with (default: nothing)")
    server = parser.add_argument_group("server backends")
    server.add_argument("--server-url", default=DEFAULT_SERVER_URL, help="base URL (default: %(default)s)")
    server.add_argument("--api-key", help="key (default: VLLM_API_KEY, then OPENAI_API_KEY)")
    server.add_argument("--checkpoint", help="encoder's checkpoint for server-memory (default: the embedded one)")
    server.add_argument("--concurrency", type=int, default=8, help="requests in flight (default: %(default)s)")
    server.add_argument("--timeout", "--timeout-s", dest="timeout_s", type=float, default=600.0, metavar="S",
                        help="seconds a request (default: 600)")  # fmt: skip
    server.add_argument("--attempts", type=int, default=8, help="tries a request before a row fails (default: 8)")
    memory = parser.add_argument_group("memory backends")
    memory.add_argument("--no-cache", dest="cache", action="store_false", help="encode every context, store nothing")
    memory.add_argument("--cache-dir", help="latent cache (default: $CODE_LLAVA_CACHE_DIR, else ~/.cache/code-llava)")
    local = parser.add_argument_group("local backends")
    local.add_argument("--device", default="auto", help="auto, cpu, cuda:0, … (default: auto)")
    local.add_argument("--batch-size", type=int, default=1, help="rows a forward pass (default: 1)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 is no limit (default: 1)")
    sampling.add_argument("--top-k", type=int, default=0, help="most likely tokens kept; 0 is no limit (default: 0)")
    sampling.add_argument("--sampling-seed", type=int, default=0, help="of the sampling (default: 0)")


def backend_settings(args: argparse.Namespace, **chosen: Any) -> BackendSettings:
    """Read the flags of `add_backend_arguments`; `chosen` names the backend, its model and how it compresses.

    Raises:
        ConfigError: A number is out of range.
    """
    for name in ("concurrency", "batch_size", "attempts", "timeout_s"):
        if getattr(args, name) <= 0:
            raise ConfigError(
                f"--{name.removesuffix('_s').replace('_', '-')} must be positive, got {getattr(args, name)}"
            )
    names = "checkpoint server_url api_key api system_prompt concurrency batch_size timeout_s device cache cache_dir"
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.sampling_seed)
    return BackendSettings(**{name: getattr(args, name) for name in names.split()}, sampling=sampling, **chosen)


def run(args: argparse.Namespace) -> int:
    """Answer the rows; exit code 3 when some failed."""
    settings = backend_settings(
        args, name=args.backend, model=args.model, chunk_size=args.chunk_size, expansion=expansion(args)
    )
    job = PredictJob(
        data_dir=args.data_dir,
        output_dir=args.output,
        tasks=resolve_tasks(args.tasks) if args.tasks else None,
        lengths=parse_lengths(args.lengths) if args.lengths else None,
        subset=args.subset,
        max_rows=args.max_rows,
        keep_input=args.keep_input,
    )
    outcomes = predict(job, settings, RetryPolicy(attempts=args.attempts))
    if args.json:
        print_json({"output_dir": str(args.output), "tasks": [asdict(outcome) for outcome in outcomes]})
    else:
        print_outcomes(outcomes)
    return exit_code(outcomes)


def print_outcomes(outcomes: Sequence[TaskOutcome]) -> None:
    """Print one line a task."""
    print(f"{'length':>8}  {'task':<16} {'rows':>6} {'new':>6} {'failed':>6}")
    for outcome in outcomes:
        length = outcome.length if outcome.length is not None else "-"
        print(f"{length:>8}  {outcome.task:<16} {outcome.rows:>6} {outcome.answered:>6} {outcome.failed:>6}")


def exit_code(outcomes: Sequence[TaskOutcome]) -> int:
    """0, or 3 when rows failed."""
    return EXIT_FAILED_ROWS if any(outcome.failed for outcome in outcomes) else EXIT_OK
