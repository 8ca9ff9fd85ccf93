"""The arms of an evaluation: their names, their budgets, and what they show."""

from __future__ import annotations

import dataclasses

import pytest

from utils.compress.arm_prompts import ArmPrompts
from utils.compress.arms import ALL, KINDS, Arm, check_arms, find_arms
from utils.errors import ConfigError, PromptError
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt
from utils.training.toy import CONFIG, build_toy_pair

TOKENIZERS = build_toy_pair()[1]
PROCESSOR = Processor(tokenizers=TOKENIZERS, chunk_size=2)
LINES = [f"name_{i} = {1000 + i}\n" for i in range(24)]
MEMORY, QUESTION = "".join(LINES), "Which value has name_17?"


def prompt_of(arm: Arm, question: str = QUESTION, answer: str | tuple[str, ...] = "1017") -> MemoryPrompt:
    prompts = ArmPrompts(PROCESSOR)
    shown = prompts.shown(arm, MEMORY, question)
    return prompts.expand(arm, PROCESSOR.parse_raw(f"{shown}\n{question}", arm.latent_size), answer)


def shown_by(kind: str, chunk_size: int = 4) -> tuple[int, str]:
    """Rows of an arm's prompt beyond the question's, and the text in it."""
    prompt, alone = prompt_of(Arm(kind, chunk_size)), prompt_of(Arm("none"))
    return len(prompt.input_ids) - len(alone.input_ids), TOKENIZERS.decoder.decode(prompt.input_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_no_arm_has_more_rows_than_its_budget(kind: str, chunk_size: int) -> None:
    rows, _ = shown_by(kind, chunk_size)
    budget = {"none": 0, "full": len(MEMORY)}.get(kind, -(-len(MEMORY) // chunk_size))
    # Two marker rows.
    assert rows <= budget + 2
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
    arms = {kind: prompt_of(Arm(kind, 8), "Which?") for kind in ("answer", "random")}
    texts = {kind: TOKENIZERS.decoder.decode(prompt.input_ids) for kind, prompt in arms.items()}
    assert LINES[17] in texts["answer"]
    assert texts["random"] != texts["answer"]
    assert arms["random"].text_rows > 0


def test_several_answers_are_all_shown() -> None:
    text = TOKENIZERS.decoder.decode(prompt_of(Arm("answer", 2), answer=("1003", "1020")).input_ids)
    assert LINES[3] in text
    assert LINES[20] in text


def test_an_arm_that_selects_needs_a_question() -> None:
    with pytest.raises(PromptError, match="asks nothing"):
        ArmPrompts(PROCESSOR).shown(Arm("bm25", 4), MEMORY, " ")


def test_arms_are_named_and_refused() -> None:
    arms = find_arms("none, full,memory,expand", [2, 4])
    assert [arm.name for arm in arms] == ["none", "full", "memory@2", "expand@2", "memory@4", "expand@4"]
    assert [arm.kind for arm in find_arms("all", [8])] == list(ALL)
    assert "answer" not in ALL
    assert find_arms("all,full", [8]) == find_arms("all", [8, 8])
    with pytest.raises(ConfigError, match="middle"):
        find_arms("middle", [2])
    with pytest.raises(ConfigError, match="answer"):
        find_arms("answer", [2], ALL)
    with pytest.raises(ConfigError, match=r"memory.*--chunk-size"):
        find_arms("full,memory", [])


def test_only_what_the_pair_was_trained_for_is_mixed() -> None:
    served = dataclasses.replace(CONFIG, chunk_sizes=(2, 4))
    check_arms(find_arms("memory,expand", [2]), served)
    check_arms(find_arms("memory,expand", [2, 4]), CONFIG)
    with pytest.raises(ConfigError, match=r"expand@4.*8"):
        check_arms(find_arms("memory,expand", [2, 4]), served)
