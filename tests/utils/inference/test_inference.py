"""`load_model`, `generate_text` and the command `python -m utils.inference.inference`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from utils.compress.select import Expansion
from utils.errors import PromptError
from utils.inference.generation import Generator
from utils.inference.inference import (
    TEST_DATA,
    build_messages,
    generate_text,
    load_model,
    main,
    published_sampling,
    read_test_data,
)
from utils.model.markers import MEMORY, MEMORY_END

EXAMPLES = [
    {"code": "def f(): return 1", "prompt": f"Look: {MEMORY} What is returned?"},
    {"code": "x = 2\n", "prompt": "What is x?"},
    {"code": "class A: pass", "prompt": f"{MEMORY} or {MEMORY}?"},
]


@pytest.fixture
def flags(checkpoints: dict[str, Path], tmp_path: Path) -> list[str]:
    (tmp_path / "data.json").write_text(json.dumps({"examples": EXAMPLES}))
    data = ["--test_data", str(tmp_path / "data.json"), "--max_tokens", "6"]
    return ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu", *data]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_published_signatures() -> None:
    names = ["checkpoint_path", "device", "chunk_size", "max_code_length", "attn_implementation", "dtype"]
    assert list(inspect.signature(load_model).parameters)[:6] == names
    names = ["model", "llm_tokenizer", "processor", "code", "prompt", "device", "max_tokens", "temperature"]
    parameters = inspect.signature(generate_text).parameters
    assert list(parameters)[: len(names)] == names
    assert [parameters[n].default for n in names[5:]] == ["auto", 512, 0.7]


def test_code_stands_for_each_placeholder_or_at_the_end() -> None:
    wrapped = "<|memory_start|>c<|memory_end|>"
    for prompt, content in (
        ("a", f"a {wrapped}"),
        (f"{MEMORY} a {MEMORY}", f"{wrapped} a {wrapped}"),
    ):
        assert build_messages("c", prompt) == [{"role": "user", "content": content}]


def test_generate_text_is_the_new_text(checkpoints: dict[str, Path]) -> None:
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu")
    prompt = processor.parse_chat(build_messages(**EXAMPLES[0]))
    greedy = {"do_sample": False, "repetition_penalty": 1.1}
    ids = model.generate([prompt], max_new_tokens=6, **greedy)[0]
    text = generate_text(model, tokenizer, processor, **EXAMPLES[0], max_tokens=6, temperature=0)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    generator = Generator(model.decoder, tokenizer)
    completion = generator.complete([model.embed_prompt(prompt)], published_sampling(6, 0.0))[0]
    assert (completion.text, completion.completion_tokens) == (text, len(ids))
    assert completion.finish_reason == ("length" if len(ids) == 6 else "stop")
    assert completion.prompt_tokens == len(prompt.input_ids)
    # Code may hold what the markers are written as; a prompt's own markers are read as such.
    assert generate_text(model, tokenizer, processor, code=f"{MEMORY} = 1", prompt="x", max_tokens=6)
    with pytest.raises(PromptError, match=r"without a <.memory_start.> before it"):
        generate_text(model, tokenizer, processor, code="x", prompt=MEMORY_END)
    with pytest.raises(PromptError, match="empty"):
        generate_text(model, tokenizer, processor, code="", prompt="x")


def test_limits_of_a_loaded_model(checkpoints: dict[str, Path]) -> None:
    _, _, processor = load_model(checkpoints["lclm"], device="cpu", chunk_size=8, max_code_length=4)
    assert processor.chunk_size == 8
    with pytest.raises(PromptError, match="more than the limit of 4"):
        processor.parse_chat(build_messages(**EXAMPLES[0]))
    _, _, processor = load_model(checkpoints["lclm"], device="cpu", max_code_length=4, truncate_memory=True)
    assert processor.parse_chat(build_messages(**EXAMPLES[0])).spans[0].truncated_tokens == 13


def test_rows_are_the_same_in_batches_of_any_size(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    alone = run(capsys, *flags, "--temperature", "0", "--batch-size", "1")
    together = run(capsys, *flags, "--temperature", "0", "--batch-size", "2")
    assert [row["text"] for row in alone] == [row["text"] for row in together]
    assert [row["index"] for row in together] == [0, 1, 2]
    assert [row["prompt"] for row in together] == [example["prompt"] for example in EXAMPLES]
    assert [row["memory_tokens"] for row in together] == [17, 6, 26]
    assert [row["num_latents"] for row in together] == [5, 2, 8]
    assert [row["ratio"] for row in together] == [3.4, 3.0, 3.25]
    assert all(row["completion_tokens"] <= 6 and row["seconds"] >= 0 for row in together)
    first = run(capsys, *flags, "--temperature", "0", "--num_examples", "1")
    assert [row["text"] for row in first] == [alone[0]["text"]]


def test_a_seed_repeats_its_samples(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        [row["text"] for row in run(capsys, *flags, "--temperature", "3", "--seed", seed)] for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_for_a_person(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert "What is x?\n> " in out
    assert "6 memory tokens → 2 latents, ratio 3.0" in out


def test_without_prompts_the_test_data_is_answered(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(capsys, "--checkpoint", str(checkpoints["code-llava"]), "--device", "cpu", "--max-tokens", "2")
    assert [row["prompt"] for row in rows] == [example["prompt"] for example in read_test_data(TEST_DATA)]


def test_questions_about_files(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu", "--max-tokens", "6", "--temperature", "0"]
    for name, text in (("a.py", "x = 2\n"), ("b.py", "y = 3\n")):
        (tmp_path / name).write_text(text)
    memory = ["--memory", str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    rows = run(capsys, *flags, *memory, "--text", "What is x?", "And y?")
    assert [(row["prompt"], row["memory_tokens"]) for row in rows] == [("What is x?", 12), ("And y?", 12)]
    # The same prompt as marked text.
    marked = "".join(f"<|memory_start|>{text}<|memory_end|>\n" for text in ("x = 2\n", "y = 3\n")) + "And y?"
    assert run(capsys, *flags, "--text", marked)[0]["text"] == rows[1]["text"]
    assert main([*flags, *memory]) == 1
    assert "--memory needs --text" in capsys.readouterr().err


def test_part_of_the_memory_stays_text(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(checkpoints["lclm"]), "--device", "cpu", "--max-tokens", "6", "--temperature", "0"]
    text = "x = 2\n" * 8 + "limit = 3\n" + "y = 1\n" * 8
    (tmp_path / "a.py").write_text(text)
    asked = [*flags, "--memory", str(tmp_path / "a.py"), "--text", "What is limit?"]
    (row,) = run(capsys, *asked, "--expand-tokens", "10")
    assert row["expanded"] == [{"span": 0, "chars": [[text.index("limit"), text.index("limit") + 10]]}]
    assert (row["text_rows"], row["memory_tokens"]) == (10, len(text))
    assert row["ratio"] == round(len(text) / (row["num_latents"] + 10), 2)
    (same,) = run(capsys, *asked, "--expand", "1/10")
    assert same["expanded"] == row["expanded"]
    (latents,) = run(capsys, *asked, "--expand", "0")
    assert latents["expanded"] == []
    assert main([*asked, "--expand-tokens", "10"]) == 0
    assert "latents + 10 rows of text" in capsys.readouterr().out
    model, tokenizer, processor = load_model(checkpoints["lclm"], device="cpu")
    answer = {"code": text, "prompt": "What is limit?", "max_tokens": 6, "temperature": 0}
    assert generate_text(model, tokenizer, processor, **answer, expansion=Expansion(tokens=10))
    endless = ["--expand", "1e-999999999"]  # as a fraction
    for wrong in (["--expand", "x"], ["--expand", "2"], endless, ["--expand-query", "y"], ["--expand-policy", "bm25"]):
        assert main([*asked, *wrong]) == 1
        assert "--expand" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "is not JSON"),
        ("[]", "expected"),
        ('{"examples": []}', "at least one example"),
        ('{"examples": [{"code": "x"}]}', "example 0 has no text under 'prompt'"),
        ('{"examples": [{"code": "", "prompt": "x"}]}', "span is empty"),
        ('{"examples": [{"code": "x", "prompt": "<|memory_end|>"}]}', "without a <|memory_start|>"),
    ],
)
def test_refused_data(
    content: str, wanted: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.json").write_text(content)
    assert main(flags) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert wanted in err


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--num-examples", "0"], "--num-examples must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must not be negative"),
        (["--max-tokens", "600"], "rows + 600 new tokens, but the decoder has 512 positions"),
        (["--max_code_length", "3"], "more than the limit of 3"),
        (["--chunk_size", "7"], "not a multiple of the chunk size 7"),
    ],
)
def test_refused_flags(extra: list[str], wanted: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, *extra]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert wanted in err
