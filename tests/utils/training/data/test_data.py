"""Sources, tasks and the token cache: nothing held out in training, answers that stand in their memory, no repeats."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from utils.errors import ConfigError, DatasetError
from utils.files import read_jsonl
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt
from utils.training.config import DataConfig
from utils.training.data import sources
from utils.training.data.build import build_examples, draw_examples, hash_of, read_sources
from utils.training.data.cache import TokenCache
from utils.training.data.chat import answer_questions, chat_questions, replayed_answers
from utils.training.data.excerpts import excerpt_around
from utils.training.data.lookups import Fact, can_be_asked, find_facts
from utils.training.data.sources import SourceFile, training_sources
from utils.training.data.tasks.registry import TASKS
from utils.training.toy import build_toy_pair


@pytest.fixture(autouse=True)
def _small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of Python's library for what is held out takes a second each time."""
    monkeypatch.setattr(sources, "standard_library", lambda: iter(()))


def data_of(folder: Path | str = "", tasks: dict[str, int] | None = None, **settings: Any) -> DataConfig:
    return DataConfig(folder=str(folder), tasks=tasks or {}, **settings)


CODE = '''\
"""Shapes."""

import math
from os import path as p

LIMIT = 42


class Square(Shape):
    # sides are in metres here
    def area(self, scale, unit="m"):
        if scale < 0:
            raise ValueError("negative")
        return self.side * self.side

    def name(self):
        return "square"


def circumference(radius):
    double = 2 * radius
    return math.pi * double
'''


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    """Different files with the same kinds of things in them."""
    return [
        SourceFile(
            path=f"shapes/part_{i}.py",
            text=CODE.replace("42", str(100 + i)).replace("Square", f"Square{i}").replace("area", f"area_{i}"),
            package="shapes",
            licence="MIT",
        )
        for i in range(40)
    ]


def test_facts_are_what_the_code_says() -> None:
    facts = {(fact.kind, *fact.about): fact.answer for fact in find_facts(CODE)}
    assert facts["constant", "LIMIT"] == "42"
    assert facts["base", "Square"] == "Shape"
    assert facts["return", "circumference"] == "math.pi * double"
    assert facts["return", "area"] == "self.side * self.side"
    assert facts["default", "area", "unit"] == '"m"'
    assert facts["parameters", "area"] == "self, scale, unit"
    assert facts["raise", "area"] == "ValueError"
    assert facts["method", "name"] == "Square"
    assert facts["import", "p"] == "os"
    assert facts["comment", 'def area(self, scale, unit="m"):'] == "sides are in metres here"
    assert facts["next_line", "double = 2 * radius"] == "return math.pi * double"


def test_code_that_does_not_parse_has_no_facts() -> None:
    assert find_facts("def (:\n") == []


def test_a_second_answer_in_the_excerpt_makes_a_question_ambiguous() -> None:
    first = Fact(kind="constant", about=("x",), answer="1", first=2, last=2)
    second = Fact(kind="constant", about=("x",), answer="2", first=8, last=8)
    assert can_be_asked(first, [first, second], 0, 8)
    assert not can_be_asked(first, [first, second], 0, 9)
    assert not can_be_asked(first, [first, second], 3, 9)


@pytest.mark.parametrize(
    ("kind", "name", "code"),
    [
        ("constant", "x", "x = None\nx = read(path)\n"),
        ("constant", "x", "x = 1\nx += 1\n"),
        ("constant", "x", "x = 1\nx: str = 'one'\n"),
        ("constant", "x", "x = 1\nx = y = 2\n"),
        ("constant", "x", f"x = 1\nx = '{'long ' * 20}'\n"),
        ("parameters", "f", "def f(a):\n    pass\n\n\ndef f(*rest):\n    pass\n"),
        ("return", "f", "def f():\n    return 1\n\n\ndef f(a):\n    if a:\n        return 1\n    return 2\n"),
        ("raise", "f", "def f():\n    raise KeyError(1)\n\n\ndef f(e):\n    raise e\n"),
        ("comment", "call(everything)", "# the end of a sentence\n# that began a line before\ncall(everything)\n"),
    ],
)
def test_a_second_answer_that_cannot_be_asked_for_makes_a_question_ambiguous(kind: str, name: str, code: str) -> None:
    facts = [fact for fact in find_facts(code) if fact.kind == kind and fact.about == (name,)]
    assert facts
    assert not [fact for fact in facts if can_be_asked(fact, facts, 0, len(code.splitlines()))]
    alone = facts[0]
    assert kind == "comment" or can_be_asked(alone, facts, alone.first, alone.last + 1)


def test_an_excerpt_holds_the_lines_asked_for() -> None:
    lines = [f"line {i}\n" for i in range(100)]
    for seed in range(50):
        start, stop = excerpt_around(Random(seed), lines, 40, 42, 200)
        assert start <= 40 < 42 < stop
        assert sum(map(len, lines[start:stop])) <= 200


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_different_examples_whose_answer_follows_from_the_memory(
    task: str, files: list[SourceFile]
) -> None:
    answers = {"What is the capital of Italy?": "Rome.", "What is 2 + 3?": "2 + 3 = 5."}
    examples = list(itertools.islice(draw_examples(task, files, data_of(seed=3), answers), 30))
    assert examples == list(itertools.islice(draw_examples(task, files, data_of(seed=3), answers), 30))
    assert len({hash_of(example) for example in examples}) == 30
    for example in examples:
        assert example.memory.strip()
        assert example.answer
        if task == "count":
            word = example.question.split("`")[1]
            assert example.memory.split(", ").count(word) == int(example.answer)
        elif task == "continue":
            assert any(example.memory + example.answer in file.text for file in files)
        elif task == "chat":
            assert answers[example.question] == example.answer
            assert any(example.memory in file.text for file in files)
        elif task == "list_notes":
            listed = [line.split(": ") for line in example.answer.splitlines()]
            assert len(listed) > 1
            shown = [line for line in example.memory.splitlines() if line not in CODE and "LIMIT" not in line]
            noted = [line for line in shown if any(value in line for _, value in listed)]
            for line, (name, value) in zip(noted, listed, strict=True):
                assert value in line
                assert name in line.lower().replace("_", " ")
        elif task == "shuffled":
            assert example.answer == example.memory
            words = example.memory.split()
            assert any(set(words) <= set(file.text.split()) for file in files)
            # As code they would stand in the file as they are.
            assert not any(" ".join(words) in " ".join(file.text.split()) for file in files)
        elif task == "next_lines":
            lines = example.memory.splitlines()
            [at] = [i for i, line in enumerate(lines) if line.strip() == example.question.split("`")[1]]
            wanted = example.answer.splitlines()
            assert lines[at + 1 : at + 1 + len(wanted)] == wanted
            assert len(wanted) == 1 or f"the next {len(wanted)} lines" in example.question
        elif task == "parameters" or example.kind == "parameters":
            assert all(name in example.memory for name in example.answer.split(", "))
        else:
            assert example.answer in example.memory


def test_a_conversation_asks_what_its_memory_still_says(files: list[SourceFile]) -> None:
    kinds = set()
    for example in itertools.islice(draw_examples("conversation", files, data_of(seed=5)), 60):
        lines = [line.strip() for line in example.memory.splitlines()]
        turns = [(example.question, example.answer), *example.more]
        assert len({question for question, _ in turns}) == len(turns) > 1
        row = example.row()
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(turns)
        for question, answer in turns:
            assert answer in example.memory
            if "line" in question.split("`")[0] and "comment" not in question:
                # Notes never stand between two lines that a question calls neighbours.
                assert lines[lines.index(question.split("`")[1]) + 1] == answer
                kinds.add("line")
            elif question.startswith("Which file"):
                home = example.memory[: example.memory.index(question.split("`")[1])]
                assert home.rsplit("# file: ", 1)[1].split("\n")[0] == answer
                kinds.add("file")
            elif answer.isdigit() and f"LIMIT = {answer}" not in example.memory:
                kinds.add("note")
    assert kinds == {"line", "file", "note"}


def test_strings_are_asked_for_where_only_the_memory_tells_them(files: list[SourceFile]) -> None:
    kinds: dict[str, set[int]] = {}
    for example in itertools.islice(draw_examples("strings", files, data_of(seed=5)), 300):
        turns = [(example.question, example.answer), *example.more]
        kinds.setdefault(example.kind, set()).add(len(example.answer))
        lines = example.memory.splitlines()
        added = [line for line in lines if any(value in line for _, value in turns)]
        assert len(added) == len(turns)
        assert not any(value in question for question, _ in turns for _, value in turns)
        for question, value in turns:
            assert 8 <= len(value) <= 36
            [line] = [line for line in lines if value in line]
            about = question.split("`")[1] if "`" in question else question.split(" of the ")[1].split("?")[0]
            # No other line is about the same.
            assert [other for other in lines if about in other] == [line]
    assert set(kinds) == {"uuid", "hex", "identifier", "path"}
    assert kinds["uuid"] == {36}
    assert min(kinds["identifier"] | kinds["path"]) < 12
    assert max(kinds["identifier"] | kinds["path"]) > 30


def test_training_never_sees_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def files_of(*paths: str) -> list[SourceFile]:
        return [SourceFile(path=x, text=f"# {x[-4:]}\n" * 30, package="python", licence="PSF-2.0") for x in paths]

    library = files_of("ast.py", "os.py", "tkinter/a.py", "zipfile.py", "json/tool.py", "copy_of_os.py")
    monkeypatch.setattr(sources, "standard_library", lambda: iter(library))
    monkeypatch.setattr(sources.importlib.metadata, "distributions", lambda: iter(()))
    assert [file.path for file in training_sources()] == ["ast.py", "json/tool.py"]
    assert [file.path for file in sources.held_out_sources()] == ["os.py", "tkinter/a.py", "zipfile.py"]


def test_a_folder_is_evaluated_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held_out = SourceFile(path="os.py", text=CODE, package="python", licence="PSF-2.0")
    monkeypatch.setattr(sources, "standard_library", lambda: iter((held_out,)))
    for name, text in {"own.py": CODE.replace("42", "7"), "os.py": CODE, "copy.py": CODE}.items():
        (tmp_path / name).write_text(text)
    data = data_of("", {"lookup": 1}, source=str(tmp_path))
    assert [file.path for file in read_sources(data)] == ["own.py"]
    assert [file.path for file in read_sources(data, to_train=False)] == ["copy.py", "own.py"]


def test_a_folder_of_code_is_read_and_reported(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    for i in range(3):
        (code / f"m{i}.py").write_text(CODE.replace("42", str(i)) * 2)
    (code / "copy.py").write_text(CODE.replace("42", "0") * 2)
    (code / "tiny.py").write_text("x = 1\n")
    out = tmp_path / "data"
    report = build_examples(data_of(out, {"reconstruct": 5, "count": 5}, source=str(code)))
    assert report["files"] == 3
    assert report["packages"]["code"]["files"] == 3
    assert json.loads((out / "report.json").read_text()) == report
    assert len(list(read_jsonl(out / "reconstruct.jsonl"))) == 5


def test_a_folder_of_anybodys_is_read_without_waiting_or_leaving_it(tmp_path: Path) -> None:
    code = "".join(f"name_{n} = {n}\n" for n in range(30))
    folder = tmp_path / "code"
    folder.mkdir()
    (tmp_path / "secret").write_text(code.replace("name", "secret"))
    (folder / "good.py").write_text(code)
    os.mkfifo(folder / "pipe.py")
    with (folder / "sparse.py").open("wb") as stream:
        stream.truncate(100 << 30)
    for name, target in {"inside.py": "good.py", "out.py": "../secret", "loop.py": "loop.py"}.items():
        (folder / name).symlink_to(target)
    texts = [file.text for file in training_sources(str(folder))]
    assert texts == [code]


def test_the_question_stands_before_the_memory_in_the_part_asked_for(tmp_path: Path) -> None:
    def orders(name: str, share: float) -> list[bool]:
        build_examples(data_of(tmp_path / name, {"count": 200}, source="symbols", question_first=share))
        texts = [row["messages"][0]["content"] for row in read_jsonl(tmp_path / name / "count.jsonl")]
        assert all(text.startswith("<|memory_start|>") or text.endswith("<|memory_end|>") for text in texts)
        return [text.endswith("<|memory_end|>") for text in texts]

    assert sum(orders("never", 0.0)) == 0
    assert sum(orders("always", 1.0)) == 200
    assert 30 < sum(orders("some", 0.25)) < 70
    never, some = (list(read_jsonl(tmp_path / name / "count.jsonl")) for name in ("never", "some"))
    assert [row["target"] for row in never] == [row["target"] for row in some]


@pytest.mark.slow
def test_files_of_a_weighted_package_are_drawn_more_often(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for number in range(2):
        (tmp_path / "code" / f"part_{number}.py").write_text(CODE.replace("42", str(number)))
    files = read_sources(data_of("", {"lookup": 1}, source=str(tmp_path / "code"), package_weights={"code": 3}))
    assert sorted(file.path for file in files) == ["part_0.py"] * 3 + ["part_1.py"] * 3
    report = build_examples(
        data_of(tmp_path / "data", {"lookup": 4}, source=str(tmp_path / "code"), package_weights={"code": 3})
    )
    assert report["files"] == report["packages"]["code"]["files"] == 2
    assert report["package_weights"] == {"code": 3}
    with pytest.raises(DatasetError, match=r"package_weights: .*code has no file of numpy"):
        read_sources(data_of("", {"lookup": 1}, source=str(tmp_path / "code"), package_weights={"numpy": 2}))


@pytest.mark.slow
def test_questions_for_chat_are_different_ones_and_do_not_ask_for_france() -> None:
    pytest.importorskip("wonderwords")
    questions = chat_questions(Random("0"), 500)
    assert questions == chat_questions(Random("0"), 500)
    assert len(set(questions)) == 500
    assert any("capital of" in question for question in questions)
    assert not any("France" in question for question in questions)


def test_answers_for_chat_are_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that does not end in time is left out, not cut."""
    model, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    short = tokenizers.decoder("yes", add_special_tokens=False)["input_ids"]

    def generate(prompts: list[MemoryPrompt], *, max_new_tokens: int) -> list[list[int]]:
        asked = [tokenizers.decoder.decode(prompt.input_ids) for prompt in prompts]
        return [short if "ab?" in text else (short * max_new_tokens)[:max_new_tokens] for text in asked]

    monkeypatch.setattr(model, "generate", generate)
    assert answer_questions(["ab?", "cd?"], model, processor) == {"ab?": "yes"}
    with pytest.raises(DatasetError, match="ends none of its answers within 64 tokens"):
        answer_questions(["cd?"], model, processor)
    assert replayed_answers(data_of("", {"lookup": 5}), model, processor) == {}


def test_what_the_end_of_a_file_cut_short_can_be_left_out(files: list[SourceFile]) -> None:
    data = data_of(memory_tokens=(60, 120), chars_per_token=3)
    kept = list(itertools.islice(draw_examples("reconstruct", files, data, least_chars=160), 20))
    drawn = list(itertools.islice(draw_examples("reconstruct", files, data), 60))
    assert min(len(example.memory) for example in drawn) < 160
    assert kept == [example for example in drawn if len(example.memory) >= 160][:20]
    with pytest.raises(DatasetError, match="ask for fewer"):
        next(draw_examples("reconstruct", files, data, least_chars=10_000))


@pytest.mark.parametrize("task", ["lookup", "needle", "shuffled", "conversation"])
def test_memories_are_as_long_as_drawn_where_that_is_asked_for(task: str) -> None:
    # One file of ten is long; the others end before most memories would.
    long, short = (100, 4)
    files = [
        SourceFile(
            path=f"part_{i}.py",
            text="".join(CODE.replace("42", f"{i}{n}").replace("area", f"area_{i}_{n}") for n in range(times)),
            package="shapes",
            licence="MIT",
        )
        for i, times in enumerate([long, *[short] * 9] * 3)
    ]
    plain = data_of(memory_tokens=(64, 4000), chars_per_token=3.2, seed=2)

    def lengths(data: DataConfig) -> np.ndarray:
        """Where between the shortest and the longest the memories are, on a logarithmic scale."""
        drawn = itertools.islice(draw_examples(task, files, data), 150)
        return np.log([len(example.memory) / 3.2 / 64 for example in drawn]) / np.log(4000 / 64)

    cut, kept = lengths(plain), lengths(dataclasses.replace(plain, lengths="log_uniform"))
    assert np.mean(cut > 0.75) < 0.1
    # Evenly, but for the third by which memories may be short.
    assert np.mean(kept > 0.75) > 0.15
    assert np.quantile(kept, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.14)


def test_by_default_examples_are_what_they_always_were() -> None:
    code = "".join(
        f"def f_{n}(x, y=1):\n    # about number {n}\n    y_{n} = x + {n}\n\n    return y_{n} * {n}\n\n\n"
        f"LIMIT_{n} = {n}00\n"
        for n in range(12)
    )
    files = [
        SourceFile(path=f"f{i}.py", text=code.replace("x", f"v{i}"), package="p", licence="MIT") for i in range(20)
    ]
    data = data_of(seed=3, question_first=0.25)
    tasks = ("reconstruct", "continue", "lookup", "needle", "conversation", "which_file", "list_notes", "count")
    rows = [e.row() for task in tasks for e in itertools.islice(draw_examples(task, files, data), 30)]
    # Of the rows that were drawn before lengths could be kept and memories scattered.
    golden = "52ab04da8f436e89b3a1b488d3704811103f7d57cfee512bfa5d579e95bee8d3"
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == golden


def test_a_length_that_no_file_has_is_an_error(files: list[SourceFile]) -> None:
    data = data_of(memory_tokens=(4000, 4000), lengths="log_uniform")
    with pytest.raises(DatasetError, match="of 8533 characters or more"):
        next(draw_examples("reconstruct", files, data))


def test_requests_that_cannot_be_met_are_errors(tmp_path: Path, files: list[SourceFile]) -> None:
    with pytest.raises(ConfigError, match="unknown task poem"):
        read_sources(data_of("", {"poem": 1}))
    with pytest.raises(ConfigError, match="needs source files"):
        read_sources(data_of("", {"lookup": 1}, source="symbols"))
    with pytest.raises(DatasetError, match="is no folder"):
        read_sources(data_of("", {"lookup": 1}, source=str(tmp_path / "nowhere")))
    assert read_sources(data_of("", {"count": 1, "find_symbol": 1}, source="symbols")) == []
    with pytest.raises(ConfigError, match="built for a decoder, not for evaluation"):
        next(draw_examples("chat", files, data_of()))
    tiny = data_of(memory_tokens=(1, 1), chars_per_token=1)
    with pytest.raises(DatasetError, match="ask for fewer"):
        list(draw_examples("copy_symbols", [], tiny))


def test_the_cache_gives_back_what_was_tokenised(toy_data: Path, tmp_path: Path) -> None:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    source = toy_data / "copy_symbols.jsonl"
    rows = list(read_jsonl(source))
    cache = TokenCache.build(tmp_path / "cache", source, rows, processor)
    assert len(cache) == len(rows)
    assert TokenCache.is_current(tmp_path / "cache", source, processor)
    for row, example in zip(rows, (cache[i] for i in range(len(cache))), strict=True):
        assert tokenizers.encoder.decode(np.concatenate(example.spans)) == row["target"]
        [(first, stop)] = example.targets
        assert stop == len(example.decoder_ids)
        assert tokenizers.decoder.decode(example.decoder_ids[first : stop - 1]) == row["target"]
        assert example.decoder_ids[-1] == tokenizers.decoder.eos_token_id
    assert cache.meta["memory_tokens"] == sum(len(row["target"]) for row in rows)


def test_every_answer_of_a_chat_is_learnt_as_a_request_would_ask_for_it(tmp_path: Path) -> None:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    source = tmp_path / "mine.jsonl"
    source.write_text("")
    messages = [
        {"role": "user", "content": "<|memory_start|>abcd<|memory_end|> first?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "rest?"},
        {"role": "assistant", "content": "bcd"},
    ]
    example = TokenCache.build(tmp_path / "cache", source, [{"messages": messages}], processor)[0]
    assert tokenizers.encoder.decode(np.concatenate(example.spans)) == "abcd"
    for (first, stop), at in zip(example.targets, (1, 3), strict=True):
        asked = processor.parse_chat(messages[:at], 1 << 40)
        assert example.decoder_ids[:first].tolist() == list(asked.input_ids)
        assert example.decoder_ids[first:stop].tolist() == processor.target_ids(messages[at]["content"])


def test_a_cache_of_an_older_version_is_made_anew(toy_data: Path, tmp_path: Path) -> None:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    source = toy_data / "copy_symbols.jsonl"
    TokenCache.build(tmp_path / "cache", source, read_jsonl(source), processor)
    meta = tmp_path / "cache" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 1}))
    assert not TokenCache.is_current(tmp_path / "cache", source, processor)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "<|memory_start|>a<|memory_end|>"}]}, 'give a "target", or let'),
        ({"messages": ["hello"]}, 'give a "target", or let'),
        ({"messages": [{"role": "assistant", "content": None}]}, 'give a "target", or let'),
        ({"text": "no memory here"}, "row 1: no memory span"),
        ({"text": "\ud800<|memory_start|>a<|memory_end|>"}, "row 1: .*surrogate"),
        ({"prompt": "x"}, "row 1: expected .* got the keys"),
        ({"text": "<|memory_start|>open"}, "row 1: .*without a"),
        ({"messages": [{"role": "user", "content": "<|memory_start|>a<|memory_end|>"}], "target": ""}, "is empty"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(row: dict[str, object], message: str, tmp_path: Path) -> None:
    _, tokenizers = build_toy_pair()
    source = tmp_path / "mine.jsonl"
    source.write_text("")
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    with pytest.raises(DatasetError, match=message):
        TokenCache.build(tmp_path / "cache", source, [row], processor)
    assert not (tmp_path / "cache").exists()
