"""`python -m ruler report`: several runs over the same rows side by side, in tables and pictures.

Writes `report.html` (one file, pictures inside), `report.md`, `report.csv` (one line a run, length and task),
`report.json` (everything) and the PNG files that the Markdown shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruler.registry import CODE_TASKS, RULER_13, TASKS
from ruler.scoring.arms import compare_arms
from ruler.scoring.score import score_run, to_csv
from utils.cli import print_json
from utils.errors import ConfigError
from utils.files import write_json, write_text

EXAMPLES = """\
  python -m ruler report out/runs/full out/runs/memory@4 out/runs/memory@8 --output out/report"""
_CSV_FIELDS = (
    "score", "strict", "rows", "expected_rows", "nulls", "prompt_tokens", "memory_tokens", "num_latents", "text_rows"
)  # fmt: skip

Run = Mapping[str, Any]


def write_report(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Score runs and write their report.

    Args:
        folders: Run folders; their names become the runs' names.
        output: Folder for the files.

    Returns:
        What `report.json` holds.

    Raises:
        ConfigError: Two runs have the same name.
        DatasetError: A run cannot be scored.
    """
    from ruler.scoring.figures import write_figures
    from utils.html_report import write_html

    runs = [score_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs have the same name ({', '.join(names)}): rename a folder")
    pictures = write_figures(runs, output)
    notes, arms = comparison_notes(runs), compare_arms(runs)
    report = {"title": "RULER report", "runs": runs, "pictures": pictures, "notes": notes, "arms": arms}
    write_json(output / "report.json", report)
    write_text(output / "report.csv", to_csv(csv_rows(runs)))
    text = markdown(report)
    write_text(output / "report.md", text)
    write_html(text, output, output / "report.html")
    return report


def comparison_notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing: incomplete tasks, and tasks whose rows differ between runs."""
    notes = []
    hashes: dict[tuple[Any, str], set[str]] = {}
    for run in runs:
        for entry in run["lengths"]:
            for task, scores in entry["tasks"].items():
                if scores["rows"] != scores["expected_rows"]:
                    place = f"{run['name']}, {task} at {entry['length']}"
                    notes.append(f"{place}: only {scores['rows']} of {scores['expected_rows']} rows are answered.")
                if scores["rows_sha256"]:
                    hashes.setdefault((entry["length"], task), set()).add(scores["rows_sha256"])
    different = [f"{task} at {length}" for (length, task), seen in hashes.items() if len(seen) > 1]
    if different:
        notes.append(f"The runs answered different rows, so do not compare: {', '.join(different)}.")
    return notes


def csv_rows(runs: Sequence[Run]) -> Iterable[list[Any]]:
    """One line a run, length and task, under a header."""
    yield ["run", "length", "task", *_CSV_FIELDS, "low", "high", "interval"]
    for run in runs:
        for entry in run["lengths"]:
            for task, scores in entry["tasks"].items():
                sure = scores["interval"]
                fields = [scores.get(name) for name in _CSV_FIELDS]
                yield [run["name"], entry["length"], task, *fields, sure["low"], sure["high"], sure["method"]]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    runs = report["runs"]
    parts = [f"# {report['title']}", *_overview(runs)]
    parts += [f"> {note}" for note in report["notes"]]
    parts += _arm_tables(report["arms"])
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in report["pictures"]]
    for heading, group, mean in (("RULER's tasks", RULER_13, "score"), ("Code tasks", CODE_TASKS, "code_score")):
        parts += _task_tables(heading, runs, group, mean)
    parts += ["## Settings", *(_settings_line(run) for run in runs)]
    return "\n\n".join(parts) + "\n"


def _overview(runs: Sequence[Run]) -> Iterable[str]:
    lengths = sorted({e["length"] for run in runs for e in run["lengths"] if e["length"]})
    header = ["run", *(f"{length}" for length in lengths), "avg", "wAvg inc", "wAvg dec", "effective length"]
    lines = []
    for run in runs:
        by_length = {e["length"]: e for e in run["lengths"]}
        cells = [_score_cell(by_length.get(length), "score") for length in lengths]
        averages = run["averages"] or {}
        names = ("mean", "weighted_increasing", "weighted_decreasing")
        reached = run["effective_length"] or "none"
        lines.append([run["name"], *cells, *(_number(averages.get(name)) for name in names), str(reached)])
    yield "## Scores"
    yield (
        "Mean over RULER's tasks (0–100) with 95 % interval; effective length = the largest tested one with a score of "
        f"at least {runs[0]['threshold']}."
    )
    yield _table(header, lines)
    yield (
        "Tokens the decoder reads a row, before and after compression (with the two markers around a memory), and "
        "memory tokens a row that stands for them, latent or text. Kvpress uses “compression ratio” for the fraction "
        "removed instead."
    )
    tokens = [
        [run["name"], str(e["length"] or "–"), _number(e["tokens_before"], 0), _number(e["tokens_after"], 0), ratio]
        for run in runs
        for e in run["lengths"]
        for ratio in [_ratio(e["ratio"])]
    ]
    yield _table(["run", "length", "tokens before", "tokens after", "ratio"], tokens)


def _ratio(ratio: float | None) -> str:
    return "nothing" if ratio is None else "text" if ratio == 1 else f"{_number(ratio)}×"


def _arm_tables(arms: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """One table a length: what each arm keeps, beside the full text and text of as many rows."""
    for length in dict.fromkeys(row["length"] for row in arms):
        yield "## Arms" + (f", {length} tokens" if length else "")
        yield (
            "Mean over the rows of all tasks (0–100); retention = (arm − none) / (full − none); differences on the "
            "same rows, with 95 % intervals. `bm25` is text of as many rows as the arm has."
        )
        lines = [
            [
                row["run"],
                str(row["rows"]),
                _number(row["score"]),
                _number(row["retention"], 2),
                _difference(row["to_full"]),
                _difference(row["to_bm25"]),
            ]
            for row in arms
            if row["length"] == length
        ]
        yield _table(["arm", "rows", "score", "retention", "− full", "− bm25"], lines)


def _difference(compared: Mapping[str, Any] | None) -> str:
    if compared is None:
        return "–"
    difference, low, high = (100 * compared[name] for name in ("difference", "low", "high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def _task_tables(heading: str, runs: Sequence[Run], group: Sequence[str], mean: str) -> Iterable[str]:
    """One table a length: tasks down, runs across."""
    for length in sorted({e["length"] or 0 for run in runs for e in run["lengths"]}):
        entries = [next((e for e in run["lengths"] if (e["length"] or 0) == length), None) for run in runs]
        tasks = [task for task in TASKS if task in group and any(e and task in e["tasks"] for e in entries)]
        if not tasks:
            continue
        lines = [[task, *(_task_cell(e["tasks"].get(task) if e else None) for e in entries)] for task in tasks]
        lines.append(["**mean**", *(f"**{_score_cell(e, mean)}**" for e in entries)])
        yield f"## {heading}" + (f", {length} tokens" if length else "")
        yield "Official score, 95 % interval, strict (word-boundary) score / tokens read."
        yield _table(["task", *(run["name"] for run in runs)], lines)


def _task_cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "–"
    sure, read = scores["interval"], scores.get("prompt_tokens")
    cell = f"{scores['score']:.1f} ({sure['low']:.0f}–{sure['high']:.0f}), {scores['strict']:.1f}"
    return f"{cell} / {read:.0f}" if read else cell


def _score_cell(entry: Mapping[str, Any] | None, name: str) -> str:
    if entry is None or entry[name] is None:
        return "–"
    sure = entry[f"{name}_interval"]
    return f"{entry[name]:.1f}" + (f" ({sure['low']:.0f}–{sure['high']:.0f})" if sure else "")


def _settings_line(run: Run) -> str:
    settings = {**run["settings"], **run["backend"]}
    stated = ", ".join(f"{name} {str(value)[:40]}" for name, value in settings.items() if value not in (None, [], ""))
    return f"- **{run['name']}**: {stated or 'written by another program'}"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of predict")
    parser.add_argument("--output", "--output-dir", type=Path, required=True, help="folder for the report's files")
    parser.add_argument("--json", action="store_true", help="print the whole report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    report = write_report(args.runs, args.output)
    if args.json:
        print_json(report)
    else:
        print(args.output / "report.html")
    return 0
