"""`python -m utils.harness`: lm-eval's command with our model and tasks; and without lm-eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import run_python
from utils.harness.__main__ import TASKS, main, with_tasks

NOT_INSTALLED = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
from utils.harness.__main__ import main
raise SystemExit(main(["--model", "code-llava", "--tasks", "memory_vt"]))
"""


def test_help_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        assert "auto_memory" in capsys.readouterr().out
    assert main([]) == 0
    assert "auto_memory" in capsys.readouterr().out


def test_our_tasks_are_included_unless_others_are_named(tmp_path: Path) -> None:
    assert with_tasks(["--tasks", "memory_vt"]) == ["--tasks", "memory_vt", "--include_path", str(TASKS)]
    for own in (["--include_path", "mine"], ["--include_path=mine", "x"]):
        assert with_tasks(own) == own
    assert with_tasks(["run"]) == ["run"]
    (tmp_path / "theirs.yaml").write_text("include_path: mine\ntasks: [x]\n")
    (tmp_path / "ours.yaml").write_text("tasks: [memory_vt]\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    for flag in ("--config", "-C"):
        own = ["run", flag, str(tmp_path / "theirs.yaml")]
        assert with_tasks(own) == own
        for name in ("ours.yaml", "broken.yaml", "missing.yaml"):
            assert with_tasks(["run", flag, str(tmp_path / name)])[-1] == str(TASKS)


def test_the_missing_extra_is_named() -> None:
    done = run_python("-c", NOT_INSTALLED)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "uv sync --extra lm-eval" in done.stderr


@pytest.mark.slow
def test_the_command_evaluates_and_writes_results(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    flags = (
        "--model", "code-llava", "--tasks", "memory_lookup", "--apply_chat_template", "--log_samples",
        "--output_path", tmp_path / "out", "--batch_size", "2", "--gen_kwargs", "max_gen_toks=4",
        "--metadata", "num_samples=3", "memory_tokens=[40,60]",
        "--model_args", f"checkpoint={checkpoints['lclm']},dtype=float32,expand=1/8",
    )  # fmt: skip
    done = run_python("-m", "utils.harness", *flags)
    assert done.returncode == 0, done.stderr
    assert "|memory_lookup" in done.stdout
    assert "Traceback" not in done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    about = results["config"]["code_llava"]
    assert about["counts"]["requests"] == about["counts"]["with_memory"] == 3
    assert about["counts"]["text_rows"] > 0
    assert about["expand"] == "1/8"
    assert results["n-samples"]["memory_lookup"] == {"original": 3, "effective": 3}
    assert list((tmp_path / "out").rglob("samples_memory_lookup_*.jsonl"))


@pytest.mark.slow
def test_errors_are_one_line(checkpoints: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval")
    model = f"checkpoint={checkpoints['lclm']}"
    done = run_python("-m", "utils.harness", "--model", "code-llava", "--tasks", "memory_lclm_eval", "-a", model)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: memory_lclm_eval needs its data")
    done = run_python("-m", "utils.harness", "ls", "tasks")
    assert done.returncode == 0
    assert "memory_niah_multikey_3" in done.stdout
