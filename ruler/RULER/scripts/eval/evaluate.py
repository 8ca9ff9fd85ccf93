"""RULER's `evaluate.py`: score the prediction files of a folder, with the reference's flags and files.

Joins slices (`<task>-<i>.jsonl`) first, then writes `summary.csv` (`summary-<task>.csv` for a single task) and
`submission.csv` into the folder. `python -m ruler score` does it for whole runs, with strict scores and intervals.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

from ruler.answering.predictions import read_predictions
from ruler.layout import length_folders
from ruler.registry import TASKS
from ruler.scoring.metrics import official_score
from ruler.scoring.score import judge_folder, nulls, write_reference_files
from utils.cli import make_parser, run_command
from utils.files import atomic_path

EXAMPLES = "  evaluate.py --data_dir pred/4096 --benchmark synthetic"


def build_parser() -> argparse.ArgumentParser:
    """Declare the reference's flags."""
    description = "Score the prediction files of a folder, with the reference's flags and files."
    parser = make_parser(description, EXAMPLES, verbose_rows=True)
    parser.add_argument("--data_dir", "--data-dir", type=Path, required=True, help="folder with <task>.jsonl")
    parser.add_argument("--benchmark", default="synthetic", choices=("synthetic",), help="(default: synthetic)")
    return parser


def join_slices(folder: Path) -> None:
    """Put `<task>-<i>.jsonl` files together in the order of `i`, and remove them."""
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in folder.glob("*.jsonl"):
        if (match := re.fullmatch(r"(.+)-(\d+)", path.stem)) and match[1] in TASKS:
            slices[match[1]][int(match[2])] = path
    for task, parts in slices.items():
        ordered = [parts[number] for number in sorted(parts)]
        for part in ordered:
            for _ in read_predictions(part):
                pass  # a broken line is an error before anything is removed
        with atomic_path(folder / f"{task}.jsonl") as temporary:
            temporary.write_bytes(b"".join(part.read_bytes() for part in ordered))
        for part in ordered:
            part.unlink()


def run(args: argparse.Namespace) -> int:
    """Score the folder."""
    (folder,) = [args.data_dir] if args.data_dir.is_dir() else length_folders(args.data_dir)
    join_slices(folder)
    judged = judge_folder(folder)
    for task, items in judged.items():
        for item, row in zip(items[: args.verbose], read_predictions(folder / f"{task}.jsonl"), strict=False):
            print(f"{task} {item.row_id}\n  input      {row.get('input', '(not kept)')}")
            print(f"  references {row['outputs']}\n  prediction {item.prediction!r}\n  value      {item.value:g}")
    path = write_reference_files(folder, judged)
    for task, items in judged.items():
        print(f"{task:<16} {official_score([item.value for item in items]):>6.2f}  nulls {nulls(items)}")
    print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
