"""Score predictions by case-insensitive substrings: all answers found (exact match), and the mean share found.

Rows without a prediction count as wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ruler.answering.predictions import read_predictions
from ruler.scoring.metrics import official_score, sample_value
from utils.cli import make_parser, print_json, run_command
from utils.errors import DatasetError
from utils.files import read_jsonl

EXAMPLES = """\
  uv run python ruler_minimal/minimal_evaluate.py --dataset data/niah.jsonl --predictions work/text/predictions.jsonl"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of 0..100 over all rows of a dataset."""

    rows: int
    missing: int
    exact_match: float
    average_match: float


def evaluate(dataset_path: Path | str, preds_path: Path | str, verbose: int = 0) -> Evaluation:
    """Score a prediction file against its dataset.

    Args:
        dataset_path: Rows with `index` and `outputs`.
        preds_path: Rows with `index` and `pred`.
        verbose: Print so many rows with their verdicts.

    Raises:
        DatasetError: A file is missing or broken, or the predictions are not of this dataset.
    """
    questions = {row["index"]: row["outputs"] for row in read_jsonl(dataset_path)}
    if not questions:
        raise DatasetError(f"{dataset_path} has no rows: prepare the dataset again")
    answers: dict[object, str] = {}
    for row in read_predictions(preds_path, required=("index", "pred")):
        if row["index"] not in questions or row["index"] in answers:
            wrong = "twice" if row["index"] in answers else "that the dataset does not have"
            raise DatasetError(f"{preds_path} answers a row {wrong}: {row['index']}; name the dataset it was made for")
        answers[row["index"]] = row["pred"]
    values = []
    for number, (index, outputs) in enumerate(questions.items()):
        values.append(sample_value(answers.get(index, ""), outputs, "all"))
        if number < verbose:
            print(f"{index}: {values[-1]:g}\n  wanted {outputs}\n  got    {answers.get(index)!r}")
    return Evaluation(
        rows=len(values),
        missing=len(values) - len(answers),
        exact_match=official_score([float(value == 1) for value in values]),
        average_match=official_score(values),
    )


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = make_parser("Score predictions by case-insensitive substrings.", EXAMPLES, verbose_rows=True)
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines with index and outputs")
    parser.add_argument("--predictions", type=Path, required=True, help="JSON lines with index and pred")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the scores."""
    print_evaluation(evaluate(args.dataset, args.predictions, args.verbose), args.json)
    return 0


def print_evaluation(evaluation: Evaluation, as_json: bool = False) -> None:
    """Print scores as lines, or as one JSON object."""
    if as_json:
        print_json(asdict(evaluation))
        return
    print(f"rows {evaluation.rows}, without a prediction {evaluation.missing}")
    print(f"exact match   {evaluation.exact_match:6.2f}")
    print(f"average match {evaluation.average_match:6.2f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
