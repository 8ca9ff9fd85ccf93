"""Memories dealt out over a prompt: nothing lost, nothing empty, every order met, other examples as they were."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import ConfigError
from utils.model.markers import split_spans
from utils.model.processor import Processor
from utils.training.config import DataConfig
from utils.training.data.build import draw_examples
from utils.training.data.cache import tokenize_row
from utils.training.data.examples import Example
from utils.training.data.scatter import scatter
from utils.training.data.sources import SourceFile
from utils.training.toy import build_toy_pair

CODE = "".join(f"def f_{n}(x):\n    y_{n} = x + {n}\n\n    return y_{n} * {n}\n\n\n" for n in range(12))
FILES = [SourceFile(path=f"f{i}.py", text=CODE.replace("x", f"v{i}"), package="p", licence="MIT") for i in range(20)]
DATA = DataConfig(folder="", memory_tokens=(40, 200), seed=4)


def drawn(task: str, scattered: float, number: int = 200) -> list[Example]:
    data = dataclasses.replace(DATA, scattered=scattered, question_first=0.3)
    return list(itertools.islice(draw_examples(task, FILES, data), number))


@given(st.text(alphabet="ab \n", max_size=40), st.integers(0, 1000))
def test_a_scattered_memory_is_whole_and_has_no_empty_part(memory: str, seed: int) -> None:
    stretches = scatter(Random(seed), memory)
    if stretches:
        assert "".join(stretch.text for stretch in stretches) == memory
        assert len(stretches) > 1
        assert any(stretch.is_memory for stretch in stretches)
        assert all(stretch.text.strip() for stretch in stretches)


def test_text_and_questions_stand_before_between_and_after_spans() -> None:
    seen: Counter[str] = Counter()
    for example in drawn("needle", 1.0):
        (message,) = example.messages()
        pieces = [(p.text, p.is_memory) for p in split_spans(message["content"], "here") if p.text.strip()]
        spans = [at for at, (_, in_span) in enumerate(pieces) if in_span]
        assert spans
        seen[f"{len(spans)} spans"] += 1
        # A question joins the text beside it: told apart by what is left without it.
        for at, (text, in_span) in enumerate(pieces):
            if not in_span:
                where = "before" if at < spans[0] else "after" if at > spans[-1] else "between"
                seen[f"question {where}"] += example.question in text
                seen[f"text {where}"] += bool(text.replace(example.question, "").strip())
        # In order and without the question they are the memory again.
        whole = message["content"].replace("<|memory_start|>", "").replace("<|memory_end|>", "").split("\n")
        whole.remove(example.question)
        assert "\n".join(whole) == example.memory
    assert min(seen[f"{what} {where}"] for what in ("question", "text") for where in ("before", "between", "after")) > 9
    assert min(seen["1 spans"], seen["2 spans"], seen["3 spans"]) > 9


def test_plain_text_goes_on_behind_scattered_memory() -> None:
    for example in drawn("continue", 1.0, 20):
        text = example.row()["text"]
        assert text.replace("<|memory_start|>", "").replace("<|memory_end|>", "") == example.memory + example.answer
        assert text.endswith(example.answer)


def test_a_share_is_scattered_and_the_others_are_what_they_were() -> None:
    plain, some = drawn("lookup", 0.0), drawn("lookup", 0.4)
    changed = [a.row() != b.row() for a, b in zip(plain, some, strict=True)]
    assert 0.3 < sum(changed) / len(changed) < 0.5
    for before, after, is_changed in zip(plain, some, changed, strict=True):
        assert (before.memory, before.question, before.answer) == (after.memory, after.question, after.answer)
        assert bool(after.stretches) == is_changed
        # In evaluation's other arms the memory is one text.
        assert before.messages("M") == after.messages("M")


def test_a_scattered_example_is_trained_on_with_all_its_spans() -> None:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    for example in drawn("needle", 1.0, 20):
        made = tokenize_row(example.row(), processor, "here")
        assert [tokenizers.encoder.decode(span) for span in made.spans] == [
            stretch.text.removesuffix("\n") for stretch in example.stretches if stretch.is_memory
        ] or not example.stretches
        ((first, stop),) = made.targets
        assert tokenizers.decoder.decode(made.decoder_ids[first:stop], skip_special_tokens=True) == example.answer


def test_a_share_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ConfigError, match="scattered: expected a number from 0 to 1, got 2"):
        DataConfig(folder="", scattered=2)
