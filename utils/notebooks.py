"""Jupyter notebooks as text: their cells' sources, in the percent format that editors read back.

    # %% [markdown]
    # What the next cell does.

    # %%
    print(1)

Outputs, which may be pictures of megabytes, are no part of it. Formats: nbformat 4, and Spyder's and Jupytext's percent
cells.
"""

from __future__ import annotations

from typing import Any

from utils.errors import DatasetError
from utils.files import parse_json

_SUFFIX = ".ipynb"


def memory_text(path: str, text: str) -> str:
    """What of a file's text is memory: of a notebook the cells, of any other all.

    Args:
        path: Its name tells what it is.
        text: All of it; an empty notebook is an empty file.

    Raises:
        DatasetError: As `notebook_text`.
    """
    return notebook_text(text) if path.endswith(_SUFFIX) and text else text


def notebook_text(text: str) -> str:
    """The cells of a notebook.

    Args:
        text: The notebook's JSON.

    Raises:
        DatasetError: It is none, or one of an older format than 4; the message is the reason without the place.
    """
    notebook = parse_json(text, "a notebook that is")
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise DatasetError("no notebook of format 4: open it in Jupyter and save it again")
    return "\n".join(map(_cell_text, cells))


def _cell_text(cell: Any) -> str:
    kind = cell.get("cell_type") if isinstance(cell, dict) else None
    source = cell.get("source") if isinstance(cell, dict) else None
    lines = "".join(source) if isinstance(source, list) and all(isinstance(x, str) for x in source) else source
    if not isinstance(kind, str) or not isinstance(lines, str):
        raise DatasetError("a notebook with a cell that has no type or no source")
    if kind == "code":
        return f"# %%\n{lines.rstrip()}\n"
    commented = "".join(f"# {line}".rstrip() + "\n" for line in lines.rstrip().splitlines())
    return f"# %% [{kind}]\n{commented}"
