"""`python -m ruler score`: the reference's numbers and files for a run, and what they leave out.

Beside each prediction file's folder: `summary.csv` and `submission.csv` byte for byte as the reference writes them. In
the run folder: `scores.json` with strict scores, intervals, effective length and averages, which `report` reads.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ruler.answering.predictions import read_predictions
from ruler.layout import length_folders, prediction_tasks, read_run_manifest
from ruler.registry import CODE_TASKS, RULER_13, TaskConfig, get_task, resolve_tasks
from ruler.scoring.metrics import (
    THRESHOLD,
    effective_length,
    interval,
    interval_of_task_mean,
    length_averages,
    official_score,
    postprocess,
    sample_value,
)
from ruler.scoring.similarity import function_value
from utils.cli import print_json
from utils.errors import DatasetError
from utils.files import provenance, write_json, write_text

SCORES_NAME = "scores.json"
EXAMPLES = """\
  python -m ruler score out/runs/text out/runs/memory
  python -m ruler score out/runs/memory --json"""
_COUNTS = ("prompt_tokens", "memory_tokens", "num_latents", "text_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One prediction with its verdicts (0..1)."""

    row_id: Any
    prediction: str
    value: float
    strict: float
    others: Mapping[str, Any]
    needle_hits: tuple[float, ...]


def judge_file(path: Path, task: str) -> list[Judged]:
    """Judge the predictions of one task, in the file's order.

    Raises:
        DatasetError: The file is empty, broken, or a row has no references.
    """
    config = get_task(task)
    judged = []
    for number, row in enumerate(read_predictions(path), start=1):
        text, references = postprocess(row["pred"]), row["outputs"]
        others = row.get("others") or {}
        try:
            value, strict = answer_values(text, references, config, others)
        except DatasetError as error:
            raise DatasetError(f"{path}, row {number}: {error}") from None
        judged.append(
            Judged(
                row_id=others.get("id", row["index"]),
                prediction=text,
                value=value,
                strict=strict,
                others=others,
                needle_hits=tuple(sample_value(text, [reference], "all") for reference in references),
            )
        )
    if not judged:
        raise DatasetError(f"{path} holds no predictions: predict first")
    return judged


def answer_values(
    text: str, references: Sequence[str], task: TaskConfig, others: Mapping[str, Any]
) -> tuple[float, float]:
    """The value of an answer, and the stricter one (0..1).

    Args:
        text: The post-processed answer.
        references: The wanted strings.
        task: Whose metric judges it.
        others: What the row has beside them: for the metric `function` its `distractors`.

    Raises:
        DatasetError: There are no references, or what the metric needs is missing.
    """
    if task.metric != "function":
        value, strict = (sample_value(text, references, task.metric, strict=strict) for strict in (False, True))
        return value, strict
    if "distractors" not in others:
        raise DatasetError("others.distractors is missing, the other functions of the context: predict again")
    return function_value(text, references, others["distractors"], task.params["language"])


def nulls(judged: Sequence[Judged]) -> str:
    """Empty predictions as `empty/all`, the reference's way to write them."""
    return f"{sum(not item.prediction for item in judged)}/{len(judged)}"


def write_reference_files(folder: Path, judged: Mapping[str, Sequence[Judged]]) -> Path:
    """Write the reference's summary and submission of one length; returns the summary's path."""
    tasks = list(judged)
    scores = [official_score([item.value for item in judged[task]]) for task in tasks]
    summary = [range(len(tasks) + 1), ["Tasks", *tasks], ["Score", *scores], ["Nulls", *map(nulls, judged.values())]]
    # With a single task the reference puts its name into the file's.
    path = folder / ("summary.csv" if len(tasks) > 1 else f"summary-{tasks[0]}.csv")
    write_text(path, to_csv(summary))
    answers = ([task, item.row_id, item.prediction] for task in tasks for item in judged[task])
    write_text(folder / "submission.csv", to_csv([["Task", "ID", "Prediction"], *answers]))
    return path


def to_csv(rows: Iterable[Iterable[Any]]) -> str:
    """CSV with minimal quotes and bare newlines; what UTF-8 cannot hold (half surrogate pairs) is escaped."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode("utf-8", "backslashreplace").decode()


def judge_folder(folder: Path, tasks: Sequence[str] | None = None) -> dict[str, list[Judged]]:
    """Judge the prediction files of one length, all or those of some tasks, in the registry's order.

    Raises:
        DatasetError: There are none, or one is broken.
    """
    found = [task for task in prediction_tasks(folder) if tasks is None or task in tasks]
    if not found:
        raise DatasetError(f"{folder} holds no predictions (<task>.jsonl): predict first (python -m ruler predict)")
    return {task: judge_file(folder / f"{task}.jsonl", task) for task in found}


def score_folder(folder: Path, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Score one length: write the reference's files, return everything known about its tasks.

    Args:
        folder: Holds `<task>.jsonl` files.
        tasks: Which to score; None for all there are.

    Returns:
        A JSON-ready object; see `score_run`.

    Raises:
        DatasetError: There is nothing to score, or a file is broken.
    """
    judged = judge_folder(folder, tasks)
    write_reference_files(folder, judged)
    data = read_run_manifest(folder).get("data", {})
    scores = {task: _task_scores(task, judged[task], data.get(task, {})) for task in judged}
    stated = (entry["max_seq_length"] for entry in data.values() if "max_seq_length" in entry)
    return {
        "length": int(folder.name) if folder.name.isdecimal() else next(stated, None),
        "tasks": scores,
        **_token_means(list(scores.values())),
        **_mean_score("score", judged, RULER_13),
        **_mean_score("code_score", judged, CODE_TASKS),
    }


def _mean_score(name: str, judged: Mapping[str, Sequence[Judged]], group: Sequence[str]) -> dict[str, Any]:
    """Plain mean over those tasks of a group that were run, and its interval; None if none was run."""
    values = [[item.value for item in judged[task]] for task in group if task in judged]
    sure = interval_of_task_mean(values)
    return {
        name: round(fmean(map(official_score, values)), 2) if values else None,
        f"{name}_interval": sure._asdict() if sure else None,
        f"{name}_tasks": len(values),
    }


def _token_means(tasks: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean tokens a row before and after compression, and memory tokens a row that stands for them, latent or text (1
    where all is text); None where unknown, or where nothing stands for them.
    """
    after = [scores["prompt_tokens"] for scores in tasks if "prompt_tokens" in scores]
    memory = [scores.get("memory_tokens", 0.0) for scores in tasks]
    standing = [scores.get("num_latents", 0.0) + scores.get("text_rows", 0.0) for scores in tasks]
    known = len(after) == len(tasks)
    return {
        "tokens_before": round(fmean(after) - fmean(standing) + fmean(memory), 1) if known else None,
        "tokens_after": round(fmean(after), 1) if known else None,
        "ratio": round(sum(memory) / sum(standing), 2) if sum(standing) else None if sum(memory) else 1.0,
    }


def _task_scores(task: str, judged: Sequence[Judged], data: Mapping[str, Any]) -> dict[str, Any]:
    values = [item.value for item in judged]
    counts = {name: [item.others[name] for item in judged if name in item.others] for name in _COUNTS}
    needles = [
        [depth, hit]
        for item in judged
        for depth, hit in zip(item.others.get("depths", ()), item.needle_hits, strict=False)
    ]
    sure = interval(values)
    return {
        "score": official_score(values),
        "strict": official_score([item.strict for item in judged]),
        "interval": sure._asdict() if sure else None,
        "nulls": nulls(judged),
        "rows": len(judged),
        "expected_rows": data.get("num_rows", len(judged)),
        "rows_sha256": data.get("rows_sha256"),
        # A mean of some rows only would compare unequal things.
        **{name: round(fmean(seen), 1) for name, seen in counts.items() if len(seen) == len(judged)},
        **({"needles": needles} if needles else {}),
        # In the file's order, which is the dataset's: runs over the same rows are compared row by row.
        "values": {str(item.row_id): item.value for item in judged},
        "family": get_task(task).family,
    }


def score_run(run: Path, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Score all lengths of a run folder, all tasks or some, and write its `scores.json`.

    Returns:
        `{"name", "settings", "backend", "lengths": [{"length", "score", "code_score", "tasks": {task: {"score",
        "strict", "interval", "nulls", "rows", "expected_rows", token means…}}}], "effective_length", "averages"}`.

    Raises:
        DatasetError: A folder holds no predictions, or a file is broken.
    """
    folders = length_folders(run)
    lengths = [score_folder(folder, tasks) for folder in folders]
    manifest = read_run_manifest(folders[0])
    scores = {entry["length"]: entry["score"] for entry in lengths if entry["length"] and entry["score"] is not None}
    result = {
        "name": run.resolve().name,
        "settings": manifest.get("settings", {}),
        "backend": manifest.get("backend", {}),
        "lengths": lengths,
        "threshold": THRESHOLD,
        "effective_length": effective_length(scores),
        "averages": length_averages(scores),
        "provenance": provenance(),
    }
    write_json(run / SCORES_NAME, result)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `score`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of predict, or of the reference")
    parser.add_argument(
        "--tasks", help="task names with commas, or ruler, code, code-extra, all (default: what was predicted)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")


def run(args: argparse.Namespace) -> int:
    """Score runs and print their tables."""
    tasks = resolve_tasks(args.tasks) if args.tasks else None
    results = [score_run(folder, tasks) for folder in args.runs]
    if args.json:
        print_json({"runs": results})
    else:
        for result in results:
            print_scores(result)
    return 0


def print_scores(result: Mapping[str, Any]) -> None:
    """Print a run's scores, one line a task and length."""
    print(f"{result['name']}\n{'length':>8}  {'task':<16} {'score':>6} {'strict':>6}  {'95 %':<15} {'nulls':>7}")
    for entry in result["lengths"]:
        length = entry["length"] or "-"
        for task, scores in entry["tasks"].items():
            sure = f"{scores['interval']['low']:.1f}–{scores['interval']['high']:.1f}"
            rows, expected = scores["rows"], scores["expected_rows"]
            note = "" if rows == expected else f"  only {rows} of {expected} rows"
            line = f"{length:>8}  {task:<16} {scores['score']:>6.2f} {scores['strict']:>6.2f}  {sure:<15}"
            print(f"{line} {scores['nulls']:>7}{note}")
        if entry["score"] is not None:
            print(f"{length:>8}  {'mean':<16} {entry['score']:>6.2f}")
    if result["averages"]:
        reached = result["effective_length"] or f"none reaches {result['threshold']}"
        averages = result["averages"]
        print(
            f"average {averages['mean']:.2f}, weighted to long {averages['weighted_increasing']:.2f}, "
            f"to short {averages['weighted_decreasing']:.2f}; effective length {reached}"
        )
