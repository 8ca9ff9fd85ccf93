"""A benchmark's results as files: `result.json`, `table.md` and pictures in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT_FILE = "result.json"
TABLE_FILE = "table.md"


def write_results(
    folder: str | Path, name: str, table: str, result: dict[str, Any], figures: dict[str, Figure]
) -> None:
    """Write all files of a benchmark, each whole; the result last, so that with it everything is there.

    Args:
        folder: Made if it is not there; files of an earlier run in it are replaced.
        name: The benchmark's.
        table: Markdown.
        result: JSON-ready.
        figures: Name → picture.
    """
    folder = Path(folder)
    for title, figure in figures.items():
        with atomic_path(folder / f"{title}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    pictures = "".join(f"\n![{title}]({title}.png)\n" for title in figures)
    write_text(folder / TABLE_FILE, f"# {name}\n\n{table}\n{pictures}")
    write_json(folder / RESULT_FILE, result)
