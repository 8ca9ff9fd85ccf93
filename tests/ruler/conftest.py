"""Small datasets for the evaluation tests, in the layout of `prepare`."""

from __future__ import annotations

import pytest

from ruler.layout import write_dataset
from ruler.registry import get_task


def make_rows(task: str, count: int, salt: str = "") -> list[dict]:
    """Rows with a context of a few sentences and one answer."""
    rows = []
    for number in range(count):
        value = str(1000000 + 7919 * number)
        head, tail = f"A question{salt}.\n", "\nWhat is it?"
        context = (
            "Filler here. " * (number % 5) + f"One of the special magic numbers for k{number} is: {value}. The end."
        )
        rows.append(
            {
                "index": number,
                "input": head + context + tail,
                "outputs": [value],
                "length": 40,
                "length_w_model_temp": 40,
                "answer_prefix": " The answer is",
                "context_start": len(head),
                "context_end": len(head) + len(context),
            }
        )
    assert get_task(task)
    return rows


@pytest.fixture
def make_dataset(tmp_path):
    """Write `data/<length>/<task>/…` and return the root."""

    def make(tasks=("niah_single_1",), lengths=(1024,), count=6, salt="", root="data"):
        for length in lengths:
            for task in tasks:
                folder = tmp_path / root / str(length) / task
                write_dataset(folder, make_rows(task, count, salt), {"mode": "balanced", "max_seq_length": length})
        return tmp_path / root

    return make
