"""The light toolkit: fair samples, true lengths, published fields and flags, and an evaluation end to end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ruler_minimal import eval_with_memory, generate_all_data, minimal_evaluate, prepare_dataset, serve_qwen3_eval
from ruler_minimal.generate_all_data import CONFIGURATIONS
from ruler_minimal.samples import CommonWordsTask, NeedleTask, VariableTask, count_words
from tests.support.fake_server import by_prompt, running
from tests.support.processes import traced
from utils.errors import ConfigError, DatasetError


@pytest.fixture
def words():
    """Skip the test where the lists of keys and words are not installed."""
    pytest.importorskip("wonderwords")


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def make(task, seed=0, max_length=400):
    return task.make(random.Random(seed), count_words, max_length)


@pytest.mark.parametrize("task", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_samples_are_fair_and_fit(task):
    if not isinstance(task, VariableTask):
        pytest.importorskip("wonderwords")
    for seed in range(20):
        sample = make(task, seed, max_length=600)
        assert count_words(sample.prompt) <= 600
        if not isinstance(task, CommonWordsTask):
            assert count_words(sample.prompt) > 600 - 20  # one filler sentence is shorter
        assert len(set(sample.outputs)) == len(sample.outputs)
        assert "<|" not in sample.prompt
        assert sample.row(3)["input"] == sample.prompt
        assert sample.row(3)["input_memory_content"] == f"<|memory_start|>{sample.memory}<|memory_end|>"
        assert all(answer in sample.memory and answer not in sample.instruction for answer in sample.outputs)


@pytest.mark.usefixtures("words")
def test_needle_keys_and_values_are_unique_and_all_asked():
    sample = make(NeedleTask(num_keys=4, num_values=4))
    needles = [part for part in sample.memory.split(". ") if part.startswith("One of the special")]
    assert len(needles) == 16 == len(set(needles)) == len(sample.outputs)
    keys = {needle.split(" for ")[1].split(" is: ")[0] for needle in needles}
    assert len(keys) == 4
    assert all(key in sample.instruction for key in keys)


def test_variable_chains_lead_to_the_answer_and_nothing_else_does():
    sample = make(VariableTask(num_chains=3, num_hops=4))
    asked = next(word for word in sample.instruction.replace(",", "").split() if word.isdecimal())
    holds: dict[str, str] = {}
    for statement in sample.memory.split("VAR ")[1:]:
        if " = " in statement:
            name, _, value = statement.partition(" = ")
            holds[name] = value.split(".")[0]
        else:  # the source of the statement before
            holds[list(holds)[-1]] = holds[statement.split(".")[0].strip()]
    assert tuple(name for name, value in holds.items() if value == asked) == sample.outputs


@pytest.mark.usefixtures("words")
def test_common_words_are_the_most_frequent_and_stand_apart():
    sample = make(CommonWordsTask(top_k=3, freq_common=5, freq_rare=2, vocab_size=12))
    words = [line.split(". ")[1] for line in sample.memory.splitlines()]
    assert {words.count(word) for word in sample.outputs} == {5}
    assert {words.count(word) for word in set(words) - set(sample.outputs)} == {2}
    assert len(set(words)) == 12
    assert not any(a != b and a in b for a in set(words) for b in set(words))


@pytest.mark.usefixtures("words")
def test_the_same_seed_gives_the_same_rows_and_a_longer_set_begins_like_a_shorter(tmp_path):
    for name, rows in (("a", "3"), ("b", "3"), ("c", "5")):
        assert prepare_dataset.main(["--num-samples", rows, "--output-dir", str(tmp_path), "--filename", name]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read(tmp_path / "c")[:3] == read(tmp_path / "a")


@pytest.mark.usefixtures("words")
def test_lengths_are_tokens_of_a_named_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # a token a character
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    flags = ["--tokenizer", str(path), "--max-seq-length", "900", "--output-dir", str(tmp_path), "--num-samples", "3"]
    assert prepare_dataset.main(flags) == 0
    for row in read(tmp_path / "niah.jsonl"):
        assert 900 - 80 < len(tokenizer.encode(row["input"]).ids) <= 900
        assert list(row) == ["index", "input", "outputs", "input_memory_instruction", "input_memory_content"]


@pytest.mark.usefixtures("words")
def test_what_cannot_be_made_is_said(tmp_path, capsys):
    with pytest.raises(DatasetError, match="only 10 are allowed"):
        make(NeedleTask(), max_length=10)
    with pytest.raises(DatasetError, match="lower --vocab-size"):
        make(CommonWordsTask(), max_length=10)
    with pytest.raises(ConfigError, match="--freq-rare must be below"):
        make(CommonWordsTask(freq_common=2, freq_rare=2))
    with pytest.raises(ConfigError, match="--top-k-common must be below"):
        make(CommonWordsTask(top_k=20))
    assert prepare_dataset.main(["--num-keys", "0"]) == 1
    assert "--num-keys must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("words")
def test_all_thirteen_datasets(tmp_path, capsys):
    assert generate_all_data.main(["--num-samples", "2", "--output-root", str(tmp_path)]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(paths) == 13
    assert all(len(read(path)) == 2 for path in paths)


@pytest.fixture
def dataset(tmp_path):
    rows = [{"index": number, "outputs": ["Ab", "cd"]} for number in range(4)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_predictions(path, answers):
    path.write_text("".join(json.dumps({"index": i, "pred": text}) + "\n" for i, text in answers))
    return path


def test_evaluation_counts_missing_rows_as_wrong(dataset, tmp_path, capsys):
    predictions = write_predictions(tmp_path / "p.jsonl", [(0, "AB and CD"), (2, "only ab")])
    flags = ["--dataset", str(dataset), "--predictions", str(predictions)]
    assert minimal_evaluate.main([*flags, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {"rows": 4, "missing": 2, "exact_match": 25.0, "average_match": 37.5}
    assert minimal_evaluate.main([*flags, "--verbose", "1"]) == 0
    assert "got    'AB and CD'" in capsys.readouterr().out


@pytest.mark.parametrize("answers", [[(9, "x")], [(0, "x"), (0, "y")]])
def test_predictions_of_another_dataset_are_refused(dataset, tmp_path, answers):
    with pytest.raises(DatasetError, match="answers a row"):
        minimal_evaluate.evaluate(dataset, write_predictions(tmp_path / "p.jsonl", answers))


def test_serve_eval_end_to_end_and_again_without_asking(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "from-the-environment")
    with running(by_prompt) as server:
        flags = ["--task", "niah", "--num-samples", "3", "--max-seq-length", "200", "--base-url", server.url,
                 "--model-name", "tiny", "--work-dir", str(tmp_path), "--json",
                 "--system-prompt", "Be brief."]  # fmt: skip
        assert serve_qwen3_eval.main(flags) == 0
        first = json.loads(capsys.readouterr().out)
        assert serve_qwen3_eval.main(flags) == 0
    assert first == json.loads(capsys.readouterr().out)
    assert first["missing"] == 0
    assert len(server.bodies) == 3
    assert set(server.keys_seen) == {"Bearer from-the-environment"}
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    rows = read(tmp_path / "data/niah_dataset.jsonl")
    assert sorted(server.prompts) == sorted(row["input"] for row in rows)
    assert [row["index"] for row in read(tmp_path / "predictions.jsonl")] == [0, 1, 2]
    assert serve_qwen3_eval.main([*flags, "--temperature", "1"]) == 1
    assert "temperature = 0.0, this run has 1.0" in capsys.readouterr().err


def test_memory_flags_choose_the_backend():
    args = eval_with_memory.build_parser().parse_args(["--local", "--model-path", "here", "--chunk-size", "4"])
    assert (args.checkpoint, args.chunk_size, args.local) == ("here", 4, True)


def test_the_light_commands_know_no_torch():
    modules = ("prepare_dataset", "generate_all_data", "minimal_evaluate", "serve_qwen3_eval")
    program = "".join(f"import ruler_minimal.{name} as command; command.build_parser()\n" for name in modules)
    _, loaded = traced("-c", program)
    assert not {"torch", "transformers", "numpy", "openai", "nltk"} & loaded
