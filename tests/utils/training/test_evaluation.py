"""Scores, intervals and the evaluation command on the toy pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.checkpoint.save import save_checkpoint
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt
from utils.training.data.examples import Example
from utils.training.evaluate.__main__ import main
from utils.training.evaluate.evaluator import Asked, Evaluator, prompts_that_fit
from utils.training.evaluate.scores import contains, edit_similarity, is_exact
from utils.training.flops import TransformerCost
from utils.training.toy import build_toy_pair

TEXT = st.text("abc", max_size=8)


def plain_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@given(TEXT, TEXT)
def test_edit_similarity_is_levenshtein(a: str, b: str) -> None:
    longest = max(len(a), len(b))
    expected = 1.0 if not longest else 1 - plain_distance(a, b) / longest
    assert edit_similarity(a, b) == pytest.approx(expected)


def test_answers_are_judged_as_a_reader_would() -> None:
    assert is_exact(" 42\n", "42")
    assert not is_exact("It is 42", "42")
    assert contains("It is 42.", "42")
    assert not contains("It is 421.", "42")
    assert contains("returns `a + b`", "a + b")


def test_a_gpu_takes_as_many_prompts_as_its_memory_holds() -> None:
    model, _ = build_toy_pair()
    assert [prompts_that_fit(model.decoder, rows, None) for rows in (100, 256, 1000, 5000)] == [8, 8, 2, 1]
    row_bytes = TransformerCost.of(model.decoder).kv_cache_bytes(1)
    assert prompts_that_fit(model.decoder, 1000, 3 * 50 * 1000 * row_bytes) == 50
    assert prompts_that_fit(model.decoder, 1000, 80 << 30) == 128
    assert prompts_that_fit(model.decoder, 1000, 0) == 1


def test_prompts_of_like_length_share_a_batch() -> None:
    """Lengths of one evaluation differ tenfold: what is padded to the longest is read in vain."""
    model, tokenizers = build_toy_pair()
    model.decoder.config.max_position_embeddings = 10_000
    example = Example(task="needle", memory="x", question="?", answer="1")
    lengths = [250, 3000, 240, 1000, 260, 990, 10]
    asked = [Asked(n, example, MemoryPrompt(input_ids=[0] * rows, spans=()), 3 + n) for n, rows in enumerate(lengths)]

    def batches(batch_size: int | None) -> list[list[int]]:
        evaluator = Evaluator(model, Processor(tokenizers=tokenizers, chunk_size=4), batch_size)
        return [[len(one.prompt.input_ids) for one in batch] for batch in evaluator._batches(asked)]

    assert batches(None) == [[10, 250, 240, 260], [1000, 990], [3000]]
    assert batches(3) == [[10, 250, 240], [260, 1000, 990], [3000]]


@pytest.mark.slow
def test_the_command_measures_every_task_under_every_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "pair", *build_toy_pair())
    code = tmp_path / "code"
    code.mkdir()
    for i in range(4):
        (code / f"m{i}.py").write_text("".join(f"value_{i}_{n} = {n}\n" for n in range(40)))
    flags = ["--checkpoint", str(tmp_path / "pair"), "--source", str(code), "--device", "cpu", "--num-examples", "2"]
    flags += [
        "--tasks",
        "needle,continue",
        "--memory-tokens",
        "16-20",
        "--seed",
        "1,2",
        "--chunk-sizes",
        "1,4",
        "--json",
    ]
    flags += ["--reference", str(tmp_path / "pair"), "--output", str(tmp_path / "out")]
    assert main(flags) == 0
    result = json.loads(capsys.readouterr().out)
    plain = {"full", "memory@1", "truncated@1", "memory@4", "truncated@4", "full, reference"}
    asked = plain | {"none"} | {f"{kind}@{size}" for kind in ("bm25", "expand", "random") for size in (1, 4)}
    cells = {(row["task"], row["metric"], row["condition"]) for row in result["rows"]}
    assert cells == {
        (task, metric, condition)
        for task, metric in (("needle", "exact"), ("needle", "contains"), ("continue", "perplexity"))
        for condition in (asked if task == "needle" else plain)
    }
    ratios = {row["condition"]: row["ratio"] for row in result["rows"] if row["task"] == "needle"}
    assert ratios["memory@1"] == 1.0
    assert 3.5 < ratios["memory@4"] <= 4.0
    # The reference is the same pair: from full text it must say the same.
    by_condition = {r["condition"]: r["mean"] for r in result["rows"] if r["metric"] == "perplexity"}
    assert by_condition["full"] == by_condition["full, reference"] == pytest.approx(by_condition["truncated@1"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"settings.json", "result.json", "records.jsonl", "table.md", "result.png", "report.html"}


BAD_FLAGS = ["--chunk-sizes 4,x", "--num-examples 0", "--memory-tokens 9,0-4", "--seed 1,x", "--arms most"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_errors(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", "symbols", "--tasks", "count", *flags.split()]) == 1
    assert capsys.readouterr().err.startswith("error: --")
