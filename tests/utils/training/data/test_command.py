"""`python -m utils.training.data`: build, tokenise, and what a configuration asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from utils.checkpoint.save import save_checkpoint
from utils.errors import ConfigError
from utils.files import read_json, read_jsonl, write_json
from utils.model.processor import Processor
from utils.training.config import parse_config
from utils.training.data.__main__ import main
from utils.training.data.folder import open_caches
from utils.training.toy import build_toy_pair

Values = Callable[..., dict[str, Any]]
BUILD = ["--source", "symbols", "--memory-tokens", "4-8", "--chars-per-token", "1"]


def test_build_then_tokenise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    assert main(["build", "--output", str(data), "--tasks", "copy_symbols=6,find_symbol=4", *BUILD]) == 0
    assert capsys.readouterr().out.startswith("copy_symbols: examples 6, size bytes ")
    save_checkpoint(tmp_path / "pair", *build_toy_pair())
    assert main(["tokenize", str(data), "--checkpoint", str(tmp_path / "pair"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {task: entry["examples"] for task, entry in report["tasks"].items()} == {"copy_symbols": 6, "find_symbol": 4}
    written = (data / "copy_symbols.tokens" / "meta.json").stat().st_mtime_ns
    assert main(["tokenize", str(data), "--checkpoint", str(tmp_path / "pair"), "--json"]) == 0
    assert (data / "copy_symbols.tokens" / "meta.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_build_chat_with_the_embedded_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(f"def answer_{number}():\n    return {number}" for number in range(40))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "answers.py").write_text(code + "\n")
    flags = ["--output", str(tmp_path / "data"), "--source", str(tmp_path / "code"), "--package-weights", "code=2"]
    assert main(["build", "--tasks", "chat=8", *flags]) == 0
    assert capsys.readouterr().out.startswith("chat: examples 8, ")
    rows = list(read_jsonl(tmp_path / "data" / "chat.jsonl"))
    assert len(rows) == 8
    assert all("<|memory_start|>" in row["messages"][0]["content"] and row["target"] for row in rows)
    report = read_json(tmp_path / "data" / "report.json")
    assert (report["files"], report["package_weights"]) == (1, {"code": 2})


def test_what_a_configuration_asks_for(run_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"folder": str(tmp_path / "data"), "source": "symbols", "tasks": {"find_symbol": 5}, "chars_per_token": 1}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_values(data={**data, "memory_tokens": [2, 4]})))
    assert main(["config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["find_symbol"]["examples"] == 5
    report = read_json(tmp_path / "data" / "report.json")
    del report["package_weights"]  # as written before there were any
    write_json(tmp_path / "data" / "report.json", report)
    assert main(["config", str(path)]) == 0
    capsys.readouterr()
    path.write_text(yaml.safe_dump(run_values(data={**data, "memory_tokens": [2, 8]})))
    assert main(["config", str(path)]) == 1
    assert "was built with memory_tokens = [2, 4], the configuration says [2, 8]" in capsys.readouterr().err


def test_bad_requests_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--output", str(tmp_path), "--tasks", "copy_symbols"]) == 1
    assert "--tasks copy_symbols: expected NAME=NUMBER" in capsys.readouterr().err
    assert main(["build", "--output", str(tmp_path), "--tasks", ""]) == 1
    assert "--tasks" in capsys.readouterr().err
    assert main(["build", "--output", str(tmp_path), "--tasks", "lookup=3", "--package-weights", "python=0"]) == 1
    assert "package_weights.python" in capsys.readouterr().err
    save_checkpoint(tmp_path / "pair", *build_toy_pair())
    assert main(["tokenize", str(tmp_path), "--checkpoint", str(tmp_path / "pair")]) == 1
    assert "has no JSONL files" in capsys.readouterr().err


def test_a_mixture_of_tasks_that_are_not_there_is_an_error(run_values: Values) -> None:
    values = run_values()
    values["stages"][0]["mixture"] = {"poems": 1}
    model, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=model.config.chunk_size)
    with pytest.raises(ConfigError, match=r"stages\[0\]\.mixture: no task poems; the data have copy_symbols"):
        open_caches(parse_config(values), model, processor)
