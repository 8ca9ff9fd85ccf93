"""The arms of an evaluation: their budgets, what they show, how they are compared, and that a killed one goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from utils.checkpoint.save import save_checkpoint
from utils.errors import ConfigError
from utils.files import read_jsonl
from utils.model.processor import Processor
from utils.training.data.examples import Example
from utils.training.evaluate.__main__ import main
from utils.training.evaluate.arms import KINDS, Arm, Prompts, find_arms
from utils.training.evaluate.evaluator import Evaluator
from utils.training.evaluate.paired import compare, mcnemar, retention
from utils.training.evaluate.records import RecordsFile
from utils.training.evaluate.report import format_table, summarize
from utils.training.toy import CONFIG, build_toy_pair

MODEL, TOKENIZERS = build_toy_pair()
PROCESSOR = Processor(tokenizers=TOKENIZERS, chunk_size=2)
LINES = [f"name_{i} = {1000 + i}\n" for i in range(24)]
EXAMPLE = Example(memory="".join(LINES), question="Which value has name_17?", answer="1017", task="lookup")
TEXT = Example(memory="abcd\nefgh\n", question="", answer="ijkl", task="continue")


def shown_by(kind: str, chunk_size: int = 4) -> tuple[int, str]:
    """Rows of an arm's prompt beyond the question's, and the text in it."""
    prompts = Prompts(PROCESSOR)
    prompt = prompts.prompt(EXAMPLE, Arm(kind, chunk_size))
    alone = len(prompts.prompt(EXAMPLE, Arm("none")).input_ids)
    return len(prompt.input_ids) - alone, TOKENIZERS.decoder.decode(prompt.input_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_no_arm_has_more_rows_than_its_budget(kind: str, chunk_size: int) -> None:
    rows, _ = shown_by(kind, chunk_size)
    budget = {"none": 0, "full": len(EXAMPLE.memory)}.get(kind, -(-len(EXAMPLE.memory) // chunk_size))
    # Two marker rows, and the line end between memory and question.
    assert rows <= budget + 3
    assert rows >= budget // 2


@pytest.mark.parametrize(
    ("kind", "has_line"),
    [("none", False), ("full", True), ("memory", False), ("truncated", False), ("bm25", True), ("expand", True)],
)
def test_an_arm_shows_what_it_says(kind: str, has_line: bool) -> None:
    _, text = shown_by(kind)
    assert (LINES[17] in text) == has_line
    assert (LINES[23] in text) == (kind == "full")


def test_the_answer_s_lines_are_selected_by_the_answer_and_others_by_chance() -> None:
    asks_nothing = dataclasses.replace(EXAMPLE, question="Which?")
    arms = {kind: Prompts(PROCESSOR).prompt(asks_nothing, Arm(kind, 8)) for kind in ("answer", "random")}
    texts = {kind: TOKENIZERS.decoder.decode(prompt.input_ids) for kind, prompt in arms.items()}
    assert LINES[17] in texts["answer"]
    assert texts["random"] != texts["answer"]
    assert arms["random"].text_rows > 0


def test_arms_are_named_and_refused() -> None:
    arms = find_arms(["none", "full", "memory", "expand"], [2, 4], CONFIG)
    assert [arm.name for arm in arms] == ["none", "full", "memory@2", "expand@2", "memory@4", "expand@4"]
    with pytest.raises(ConfigError, match="middle"):
        find_arms(["middle"], [2], CONFIG)
    served = dataclasses.replace(CONFIG, chunk_sizes=(2, 4))
    assert len(find_arms(["memory", "expand"], [2], served)) == 2
    with pytest.raises(ConfigError, match=r"expand@4.*8"):
        find_arms(["memory", "expand"], [2, 4], served)


def test_a_continuation_has_only_the_arms_that_need_no_question() -> None:
    arms = find_arms(KINDS, [2], CONFIG)
    records = list(Evaluator(MODEL.eval(), PROCESSOR).run([TEXT], arms))
    assert [record["condition"] for record in records] == ["full", "memory@2", "truncated@2"]
    assert all(record["nll"] > 0 for record in records)
    assert "question" in format_table(summarize(records))


def test_what_does_not_fit_the_decoder_is_counted_and_not_scored() -> None:
    long = dataclasses.replace(EXAMPLE, memory="".join(LINES) * 2)
    arms = find_arms(["full", "memory", "bm25"], [4], CONFIG)
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
    arms = find_arms(["full", "memory"], [2], CONFIG)
    full, memory = Evaluator(MODEL.eval(), PROCESSOR).run([EXAMPLE], arms)
    assert full["encode_ms"] == 0 < memory["encode_ms"]
    assert min(full["read_ms"], memory["read_ms"]) > 0
    assert MODEL.cached_encoder is None


def test_an_exact_test_of_paired_answers() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 0.0625
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 512)
    assert mcnemar(4, 4) == 1.0


def test_arms_are_compared_on_the_examples_that_both_answered() -> None:
    one, other = {1: True, 2: True, 3: False, 4: True}, {1: False, 2: True, 3: False, 5: True}
    assert compare(one, other) == {"difference": pytest.approx(1 / 3), "count": 3, "p": 1.0}
    assert compare(one, {9: True}) is None
    assert "p" not in compare({1: 0.5}, {1: 0.25})  # type: ignore[operator]


def test_retention_is_what_is_kept_of_what_the_text_gives() -> None:
    none, full = {n: n < 1 for n in range(10)}, {n: n < 9 for n in range(10)}
    assert retention({n: n < 5 for n in range(10)}, none, full) == pytest.approx(0.5)
    assert retention(none, none, none) is None
    assert retention({1: True}, {2: True}, full) is None


def record(number: int, condition: str, exact: bool) -> dict[str, Any]:
    rows = {"memory_tokens": 100, "num_latents": 20, "text_rows": 5, "prompt_rows": 40, "encode_ms": 1, "read_ms": 2}
    return {"number": number, "task": "lookup", "condition": condition, "exact": exact, "contains": exact, **rows}


def test_a_summary_has_retention_and_paired_differences() -> None:
    right = {"none": 0, "full": 8, "bm25@4": 2, "expand@4": 8}
    records = [record(n, condition, n < count) for condition, count in right.items() for n in range(10)]
    rows = {row["condition"]: row for row in summarize(records) if row["metric"] == "exact"}
    mixed = rows["expand@4"]
    assert mixed["retention"] == pytest.approx(1.0)
    assert mixed["to_full"] == {"difference": 0.0, "count": 10, "p": 1.0}
    assert mixed["to_bm25"] == {"difference": pytest.approx(0.6), "count": 10, "p": pytest.approx(2 / 64)}
    assert mixed["ratio"] == 4.0
    assert rows["bm25@4"]["retention"] == pytest.approx(0.25)
    assert "+0.600 (0.031)" in format_table(summarize(records))


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
