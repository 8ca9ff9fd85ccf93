"""What the generator tests share: the data that the reference's rows were made from, unpacked once a run."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from ruler.generation.generate import Recipe

PACKED = Path(__file__).parents[1] / "data" / "ruler"


@cache
def reference_folder() -> Path:
    """A folder with essays, questions and `tokenizer.json`."""
    folder = Path(mkdtemp(prefix="ruler-data-"))
    for packed in PACKED.glob("*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


def recipe(task: str, max_seq_length: int = 4096, **values: Any) -> Recipe:
    """A small recipe over that data."""
    if task.startswith(("niah", "cwe")):
        pytest.importorskip("wonderwords")  # their keys and words
    folder = str(reference_folder())
    defaults = {"tokenizer": f"{folder}/tokenizer.json", "num_samples": 5, "data_dir": folder}
    return Recipe(task=task, max_seq_length=max_seq_length, **{**defaults, **values})
