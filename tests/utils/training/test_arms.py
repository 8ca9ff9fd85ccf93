"""An evaluation in several arms: records, times, the summary beside other arms, and that a killed one goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from utils.checkpoint.save import save_checkpoint
from utils.compress.arms import ALL, Arm, find_arms
from utils.errors import ConfigError
from utils.files import read_jsonl
from utils.model.processor import Processor
from utils.training.data.examples import Example
from utils.training.evaluate.__main__ import main
from utils.training.evaluate.evaluator import Evaluator
from utils.training.evaluate.records import RecordsFile
from utils.training.evaluate.report import format_table, summarize
from utils.training.toy import build_toy_pair

MODEL, TOKENIZERS = build_toy_pair()
PROCESSOR = Processor(tokenizers=TOKENIZERS, chunk_size=2)
LINES = [f"name_{i} = {1000 + i}\n" for i in range(24)]
EXAMPLE = Example(memory="".join(LINES), question="Which value has name_17?", answer="1017", task="lookup")
TEXT = Example(memory="abcd\nefgh\n", question="", answer="ijkl", task="continue")


def test_a_continuation_has_only_the_arms_that_need_no_question() -> None:
    arms = find_arms(",".join(ALL), [2])
    records = list(Evaluator(MODEL.eval(), PROCESSOR).run([TEXT], arms))
    assert [record["condition"] for record in records] == ["full", "truncated@2", "memory@2"]
    assert all(record["nll"] > 0 for record in records)
    assert "question" in format_table(summarize(records))


def test_what_does_not_fit_the_decoder_is_counted_and_not_scored() -> None:
    long = dataclasses.replace(EXAMPLE, memory="".join(LINES) * 2)
    arms = find_arms("full,memory,bm25", [4])
    records = list(Evaluator(MODEL.eval(), PROCESSOR).run([EXAMPLE, long], arms))
    assert len(records) == 6
    rows = {row["condition"]: row for row in summarize(records) if row["metric"] == "exact"}
    assert (rows["full"]["count"], rows["full"]["too_long"]) == (1, 1)
    assert (rows["memory@4"]["count"], rows["memory@4"]["too_long"]) == (2, 0)
    assert rows["bm25@4"]["to_full"]["count"] == 1
    assert "| full | 1 | 1 |" in format_table(summarize(records))


def test_nothing_fits() -> None:
    long = dataclasses.replace(EXAMPLE, memory="".join(LINES) * 2)
    records = list(Evaluator(MODEL.eval(), PROCESSOR).run([long], [Arm("full")]))
    assert "| full | 0 | 1 |" in format_table(summarize(records))


def test_encoding_is_timed_apart_from_reading() -> None:
    arms = find_arms("full,memory", [2])
    full, memory = Evaluator(MODEL.eval(), PROCESSOR).run([EXAMPLE], arms)
    assert full["encode_ms"] == 0 < memory["encode_ms"]
    assert min(full["read_ms"], memory["read_ms"]) > 0
    assert MODEL.cached_encoder is None


def test_arms_with_latents_of_one_chunk_size_encode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = MODEL.memory_encoder.forward
    monkeypatch.setattr(MODEL.memory_encoder, "forward", lambda spans: encoded.append(len(spans)) or encode(spans))
    arms = find_arms("memory,expand,random", [2, 4])
    records = list(Evaluator(MODEL.eval(), PROCESSOR).run([EXAMPLE, EXAMPLE], arms))
    # Equal memories at the chunk sizes 2, 4 and 8.
    assert encoded == [1, 1, 1]
    assert {record["encode_ms"] > 0 for record in records} == {True}
    of_four = [r["encode_ms"] for r in records if r["condition"] in ("memory@4", "expand@2", "random@2")]
    assert of_four == of_four[:1] * 6


def record(number: int, condition: str, exact: bool, **place: Any) -> dict[str, Any]:
    rows = {"memory_tokens": 100, "num_latents": 20, "text_rows": 5, "prompt_rows": 40, "encode_ms": 1, "read_ms": 2}
    return {
        "number": number,
        "task": "lookup",
        "condition": condition,
        "exact": exact,
        "contains": exact,
        **rows,
        **place,
    }


def test_a_summary_has_retention_and_paired_differences() -> None:
    right = {"none": 0, "full": 8, "bm25@4": 2, "expand@4": 8}
    records = [record(n, condition, n < count) for condition, count in right.items() for n in range(10)]
    rows = {row["condition"]: row for row in summarize(records) if row["metric"] == "exact"}
    mixed = rows["expand@4"]
    assert mixed["retention"] == pytest.approx(1.0)
    assert mixed["to_full"] == {"difference": 0.0, "count": 10, "p": 1.0, "low": -mixed["to_full"]["high"], "high": ANY}
    assert mixed["to_bm25"]["difference"] == pytest.approx(0.6)
    assert mixed["to_bm25"]["p"] == pytest.approx(2 / 64)
    assert mixed["ratio"] == 4.0
    assert rows["bm25@4"]["retention"] == pytest.approx(0.25)
    table = format_table(summarize(records))
    assert "+0.600 (0.031)" in table
    assert "`expand@4` is better than `bm25@4`" in table


def test_lengths_and_seeds_are_told_apart() -> None:
    records = [
        record(100 * length + 10 * seed + n, "full", n < right, length=f"{length}k", seed=seed)
        for length, seed, right in ((1, 0, 4), (1, 1, 2), (4, 0, 1), (4, 1, 1))
        for n in range(4)
    ]
    rows = [row for row in summarize(records) if row["metric"] == "exact"]
    assert [(row["length"], row["count"], row["mean"]) for row in rows] == [("1k", 8, 0.75), ("4k", 8, 0.25)]
    assert rows[0]["by_seed"] == {"0": 1.0, "1": 0.5}
    table = format_table(summarize(records))
    assert "| lookup 4k |" in table
    assert "| 0.500–1.000 |" in table


@pytest.mark.parametrize(
    ("better", "words"), [(8, "is better than"), (5, "cannot be told apart from"), (2, "is worse than")]
)
def test_a_verdict_says_whether_latents_beat_text(better: int, words: str) -> None:
    right = {"memory@4": range(2 * better), "bm25@4": range(10)}
    records = [record(n, condition, n in numbers) for condition, numbers in right.items() for n in range(20)]
    assert words in format_table(summarize(records))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("pair")
    save_checkpoint(root / "pair", *build_toy_pair())
    code = root / "code"
    code.mkdir()
    for i in range(4):
        (code / f"m{i}.py").write_text("".join(f"value_{i}_{n} = {n}\n" for n in range(40)))
    shown = ["--tasks", "needle", "--memory-tokens", "16-20", "--arms", "none,memory,expand", "--chunk-size", "2"]
    pair = ["--checkpoint", str(root / "pair"), "--source", str(code), "--device", "cpu"]
    return [*pair, *shown, "--num-examples", "3", "--batch-size", "1"]


def test_records_of_an_unfinished_evaluation_are_taken_up(tmp_path: Path) -> None:
    made = [record(n, "full", True) for n in range(3)]
    with RecordsFile(tmp_path, {"seed": 1, "threads": 1}) as records:
        records.take(made)
    with (tmp_path / "records.jsonl").open("a") as stream:
        stream.write('{"number": 3, "condi')
    with RecordsFile(tmp_path, {"seed": 1, "threads": 2}) as records:
        assert records.all == made
        assert records.done == {("full", n) for n in range(3)}
        records.take([record(3, "full", True)])
    assert len(list(read_jsonl(tmp_path / "records.jsonl"))) == 4
    with pytest.raises(ConfigError, match="seed"), RecordsFile(tmp_path, {"seed": 2}):
        pass
    (tmp_path / "result.json").write_text("{}")
    with RecordsFile(tmp_path, {"seed": 2}) as records:
        assert records.all == []
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--output", str(tmp_path)]) == 0
    whole = list(read_jsonl(tmp_path / "records.jsonl"))
    assert len(whole) == 9
    # As a kill leaves it: some records, half a line, no result.
    kept = [{**row, "answer": "kept"} for row in whole[:4]]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    (tmp_path / "records.jsonl").write_text(lines + json.dumps(whole[4])[:30])
    (tmp_path / "result.json").unlink()
    assert main([*flags, "--output", str(tmp_path), "--seed", "3"]) == 1
    assert "seed" in capsys.readouterr().err
    assert main([*flags, "--output", str(tmp_path)]) == 0
    again = list(read_jsonl(tmp_path / "records.jsonl"))
    assert [row["answer"] for row in again] == ["kept"] * 4 + [row["answer"] for row in whole[4:]]
    assert [(row["condition"], row["number"]) for row in again] == [(r["condition"], r["number"]) for r in whole]
    assert (tmp_path / "result.json").exists()
    # A whole evaluation is no part of the next one.
    assert main([*flags, "--output", str(tmp_path), "--seed", "3"]) == 0
    assert all(row["answer"] != "kept" for row in read_jsonl(tmp_path / "records.jsonl"))
