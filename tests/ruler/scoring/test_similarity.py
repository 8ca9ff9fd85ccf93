"""Answers that should be a function: the best match in the context, and like enough."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ruler.scoring.score import score_run
from ruler.scoring.similarity import THRESHOLD, bleu, first_function, function_value
from utils.errors import DatasetError

WANTED = """\
@cached
def settle(
    ledger, year=None
):
    total = 0
    for entry in ledger:
        if year is None or entry.year == year:
            total += entry.amount

    return total"""
OTHER = "def load(path):\n    with open(path) as stream:\n        return stream.read()"
BRACES = "template <typename T>\ninline T twice(T x) {\n  if (x) { log('{'); }\n  return 2 * x;\n}"


def test_bleu_is_nltks() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    def tokens(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)

    texts = [
        WANTED,
        WANTED.replace("total", "amount"),
        WANTED[:120],
        OTHER,
        OTHER + "\n" + WANTED,
        "settle(ledger, year)",
    ]
    for candidate in texts:
        for reference in texts:
            expected = sentence_bleu(
                [tokens(reference)], tokens(candidate), smoothing_function=SmoothingFunction().method2
            )
            assert bleu(candidate, reference) == pytest.approx(expected, abs=1e-9)
    assert bleu(WANTED, WANTED) == 1
    assert bleu("", WANTED) == bleu("?", "word") == 0


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "{}\n\nThis function sums a ledger.",
        "Here it is:\n\n```python\n{}\n```\nIt sums.\n```python\ndef no(): pass\n```",
        "\n\n{}\n# networkx/utils.py\ndef other():\n    return 1",
    ],
)
def test_text_around_the_function_does_not_count(around: str) -> None:
    answer = around.replace("{}", WANTED)
    assert first_function(answer, "python") == WANTED
    assert function_value(answer, [WANTED], [OTHER], "python") == (1.0, 1.0)


@pytest.mark.parametrize("around", ["{}", "It doubles:\n{}\nint main() {{}}", "```cpp\n{}\n```"])
def test_functions_in_braces(around: str) -> None:
    answer = around.replace("{}", BRACES, 1)
    assert first_function(answer, "cpp") == BRACES
    assert function_value(answer, [BRACES], [], "cpp") == (1.0, 1.0)


def test_a_body_that_does_not_close_is_taken_as_it_is() -> None:
    assert first_function(BRACES[:-2], "cpp") == BRACES[:-2]
    assert function_value(BRACES[:-2], [BRACES], [], "cpp") == (1.0, 0.0)


def test_near_is_right_but_not_strictly() -> None:
    near = WANTED.replace("entry.amount", "entry.sum")
    assert THRESHOLD < bleu(near, WANTED) < 1
    assert function_value(near, [WANTED], [OTHER], "python") == (1.0, 0.0)
    # Spaces do not count, another layout of the same words is the same.
    assert (
        function_value(WANTED.replace("\n    ledger, year=None\n", "ledger, year=None"), [WANTED], [], "python")[1] == 1
    )


def test_another_function_of_the_context_is_wrong() -> None:
    assert function_value(OTHER, [WANTED], [OTHER], "python") == (0.0, 0.0)
    near = WANTED.replace("entry.amount", "entry.sum")
    assert function_value(near, [WANTED], [OTHER, near], "python") == (0.0, 0.0)
    assert function_value(near, [WANTED], [OTHER, WANTED], "python") == (0.0, 0.0)  # no better than another one


@pytest.mark.parametrize("answer", ["", "I do not know.", "settle", WANTED[:60]])
def test_less_is_wrong(answer: str) -> None:
    assert function_value(answer, [WANTED], [OTHER], "python") == (0.0, 0.0)


def test_one_function_is_wanted() -> None:
    with pytest.raises(DatasetError, match="2 references"):
        function_value(WANTED, [WANTED, OTHER], [], "python")


def test_scoring_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "1024"
    folder.mkdir()
    rows = [
        {"index": number, "pred": pred, "outputs": [WANTED], "others": {"distractors": [OTHER]}}
        for number, pred in enumerate([WANTED, WANTED.replace("entry.amount", "entry.sum"), OTHER, ""])
    ]
    path = folder / "repoqa_code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = score_run(tmp_path)["lengths"][0]
    assert (scores["score"], scores["code_score"]) == (None, 50.0)
    task = scores["tasks"]["repoqa_code"]
    assert (task["score"], task["strict"], task["nulls"]) == (50.0, 25.0, "1/4")
    assert task["interval"]["method"] == "wilson"
    path.write_text(json.dumps({"index": 0, "pred": "", "outputs": [WANTED]}) + "\n")
    with pytest.raises(DatasetError, match=r"repoqa_code\.jsonl, row 1: others\.distractors is missing"):
        score_run(tmp_path)
