"""The parts that benchmarks are made of: stages, sweeps, cuts, result folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.benchmark import stages
from utils.benchmark.figures import memory_by_length
from utils.benchmark.material import cut_points
from utils.benchmark.results import write_results
from utils.benchmark.stages import StageClock
from utils.benchmark.ttft_cases import Case, plan
from utils.errors import ConfigError

CPU = torch.device("cpu")


def test_a_stage_does_not_count_what_is_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    class Slow(torch.nn.Module):
        def forward(self, seconds: float) -> float:
            now[0] += seconds
            return seconds

    module, clock = Slow(), StageClock(CPU)
    now[0] += 100
    with clock.stage("encode"), clock.watching(module, "project"):
        now[0] += 1
        module(10)
        now[0] += 2
        module(20)
    now[0] += 100
    with clock.stage("encode"):
        now[0] += 4
    module(1000)
    assert clock.seconds == {"encode": 7, "project": 30}


def flags(**changes: Any) -> Any:
    values = {
        "tokens": 10, "dtype": "auto", "batch": 1, "chunk_size": None, "spans": 1, "repeats": 1, "product": False,
        "also_tokens": [20, 30], "also_dtypes": ["float32"], "also_batches": [2], "also_chunk_sizes": [4],
        "also_spans": [3, 1],
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_each_sweep_varies_one_thing() -> None:
    groups = plan(flags())
    cases = [case for group in groups for case in group.cases]
    base = Case(tokens=10, dtype="auto", batch=1, chunk_size=None, spans=1)
    assert cases[0] == base
    assert len(cases) == len(set(cases)) == 1 + 2 + 1 + 1 + 1 + 1
    names = ("tokens", "dtype", "batch", "chunk_size", "spans")
    assert all(sum(getattr(case, x) != getattr(base, x) for x in names) == 1 for case in cases[1:])
    # Chunk sizes and spans of one length, dtype and batch share their full text.
    assert sorted(len(group.cases) for group in groups) == [1, 1, 1, 1, 3]
    assert all({c.tokens for c in group.cases} == {group.tokens} for group in groups)


def test_the_product_combines_everything() -> None:
    cases = [case for group in plan(flags(product=True)) for case in group.cases]
    assert len(cases) == len(set(cases)) == 3 * 2 * 2 * 2 * 2


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        plan(flags(also_batches=[0]))


@given(st.data())
def test_cuts_cover_everything_and_are_never_empty(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 500))
    count = data.draw(st.integers(1, total))
    cuts = cut_points(total, count)
    assert [n for a, b in cuts for n in range(a, b)] == list(range(total))
    assert len(cuts) == count
    assert all(a < b for a, b in cuts)


def test_more_spans_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="--spans 6: expected 1 to 5"):
        cut_points(5, 6)


def test_a_result_folder_has_everything(tmp_path: Path) -> None:
    rows = [{"tokens": n, "peak_bytes": 3 * n, "loaded_bytes": 2 * n, "latent_bytes": n} for n in (10, 20)]
    result = {"benchmark": "memory", "rows": rows}
    write_results(tmp_path / "new", "memory", "| a |", result, {"memory_by_length": memory_by_length(rows)})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "memory_by_length.png", "result.json", "table.md",
    ]  # fmt: skip
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    assert "| a |\n\n![memory_by_length](memory_by_length.png)" in (tmp_path / "new" / "table.md").read_text()
    assert (tmp_path / "new" / "memory_by_length.png").read_bytes().startswith(b"\x89PNG")
