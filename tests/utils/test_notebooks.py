"""Notebooks are their cells, on every way in that knows a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.corpus.source import Document, FolderSource, Problem
from utils.errors import DatasetError, PromptError
from utils.flags import read_memory_files
from utils.notebooks import notebook_text

CELLS = [
    {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "\n", "Some text."]},
    {
        "cell_type": "code",
        "metadata": {},
        "outputs": [{"data": {"image/png": "x" * 999}}],
        "source": "x = 1\nprint(x)\n",
    },
    {"cell_type": "raw", "source": []},
]
NOTEBOOK = json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": CELLS})
TEXT = "# %% [markdown]\n# # Title\n#\n# Some text.\n\n# %%\nx = 1\nprint(x)\n\n# %% [raw]\n"


def test_every_way_in(tmp_path: Path) -> None:
    assert notebook_text(NOTEBOOK) == TEXT
    path = tmp_path / "a.ipynb"
    path.write_text(NOTEBOOK, encoding="utf-8-sig")
    assert [piece.text for piece in read_memory_files([str(path)]).pieces if piece.is_memory] == [TEXT]
    source = FolderSource(str(tmp_path))
    (document,) = source.scan()
    assert isinstance(document, Document)
    assert source.read(document) == TEXT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no notebook of format 4"),
        ('{"worksheets": []}', "no notebook of format 4"),
        ('{"cells": [5]}', "no type or no source"),
        ('{"cells": [{"cell_type": "code", "source": [1]}]}', "no type or no source"),
    ],
)
def test_what_is_no_notebook_is_named(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=reason):
        notebook_text(text)
    path = tmp_path / "a.ipynb"
    path.write_text(text)
    with pytest.raises(PromptError, match=rf"a\.ipynb: .*{reason}"):
        read_memory_files([str(path)])
    (problem,) = FolderSource(str(tmp_path)).scan()
    assert isinstance(problem, Problem)
    assert reason in problem.reason
