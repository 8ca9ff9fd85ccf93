"""What the two evaluating commands share: a dataset, made or given; answers, resumably; the score."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from ruler.answering.predict import start_backend
from ruler.answering.predictions import DataRow, PredictionFile
from ruler.answering.protocol import DEFAULT_SERVER_URL, BackendSettings
from ruler.answering.runner import ask
from ruler.layout import MANIFEST, claim_run_folder
from ruler_minimal.minimal_evaluate import evaluate, print_evaluation
from ruler_minimal.prepare_dataset import add_task_arguments, build_task, write_dataset
from utils.cli import EXIT_FAILED_ROWS, EXIT_OK
from utils.client.completion import RetryPolicy, Sampling
from utils.errors import DatasetError
from utils.files import read_jsonl, write_json
from utils.model.markers import MEMORY_END, MEMORY_START


def add_evaluation_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Declare the flags that both commands have."""
    add_task_arguments(parser)
    parser.add_argument("--dataset", type=Path, help="answer this dataset (default: make one with the flags above)")
    parser.add_argument("--work-dir", type=Path, default=Path(work_dir), help="for dataset and predictions "
                        "(default: %(default)s); the same command again answers only what is missing")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    server = parser.add_argument_group("server")
    server.add_argument("--server-url", "--base-url", default=DEFAULT_SERVER_URL,
                        help="with or without /v1 (default: %(default)s)")  # fmt: skip
    server.add_argument("--model-name", help="served name (default: the only one served)")
    server.add_argument("--api-key", help="key (default: VLLM_API_KEY, then OPENAI_API_KEY)")
    server.add_argument("--concurrency", type=int, default=4, help="requests in flight (default: 4)")
    server.add_argument("--timeout", "--timeout-s", type=float, default=300.0, help="seconds a request (default: 300)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-tokens", "--max-new-tokens", type=int, default=128, help="most new tokens (default: 128)"
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="1 is no limit (default: 1)")
    sampling.add_argument("--system-prompt", default="", help="what the chat begins with (default: nothing)")


def chat_settings(args: argparse.Namespace, **chosen: Any) -> BackendSettings:
    """Read the flags of `add_evaluation_arguments`; `chosen` names the backend and what is its own."""
    return BackendSettings(
        server_url=args.server_url,
        api_key=args.api_key,
        api="chat",
        system_prompt=args.system_prompt,
        concurrency=args.concurrency,
        timeout_s=args.timeout,
        sampling=Sampling(temperature=args.temperature, top_p=args.top_p),
        **chosen,
    )


def run_evaluation(args: argparse.Namespace, settings: BackendSettings) -> int:
    """Make the dataset, answer it and print the score; exit code 3 when rows failed.

    Raises:
        DatasetError: The work folder holds answers made with other settings, or to other rows.
    """
    write_json(args.work_dir / MANIFEST, claim_run_folder(args.work_dir, settings.identity(), subset="light"))
    dataset = args.dataset
    if dataset is None:
        dataset = args.work_dir / "data" / f"{args.task}_dataset.jsonl"
        write_dataset(dataset, build_task(args), args)
    rows = [DataRow(number=number, fields=_fields(row)) for number, row in enumerate(read_jsonl(dataset))]
    predictions = args.work_dir / "predictions.jsonl"
    failed = asyncio.run(_answer(rows, predictions, settings, args.max_tokens))
    print_evaluation(evaluate(dataset, predictions, args.verbose), args.json)
    return EXIT_FAILED_ROWS if failed else EXIT_OK


async def _answer(rows: list[DataRow], path: Path, settings: BackendSettings, max_tokens: int) -> int:
    """Answer what is missing; returns the number of failed rows."""
    from tqdm import tqdm

    with PredictionFile(path, rows) as file:
        if not file.missing:
            return 0
        backend = await start_backend(settings, RetryPolicy())
        try:
            with tqdm(total=len(file.missing), unit="row", disable=None) as bar:
                failed = await ask(backend, file, file.missing, max_tokens=max_tokens, on_row=bar.update)
        finally:
            await backend.close()
    return len(failed)


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """A light row in RULER's fields: the whole prompt, and which part of it is the memory.

    Raises:
        DatasetError: The row lacks a field.
    """
    try:
        instruction, wrapped = row["input_memory_instruction"], row["input_memory_content"]
        memory = wrapped.removeprefix(MEMORY_START).removesuffix(MEMORY_END)
        start = len(instruction) + 2
        return {
            "index": row["index"],
            "input": f"{instruction}\n\n{memory}",
            "outputs": row["outputs"],
            "context_start": start,
            "context_end": start + len(memory),
        }
    except KeyError as missing:
        raise DatasetError(f"a dataset row has no field {missing}: prepare it with prepare_dataset.py") from None
