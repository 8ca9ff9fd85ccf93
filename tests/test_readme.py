"""The README's commands run as they stand there; a line with `# needs …` asks for what a test machine lacks."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.support import processes
from tests.support.marks import needs_default_checkpoint
from utils.files import PROJECT_ROOT

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    return [
        line for line in lines if line.startswith("uv run ") and "# needs" not in line and "pytest" not in line.split()
    ]


COMMANDS = commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    arguments = shlex.split(command, comments=True)
    assert arguments[:3] == ["uv", "run", "python"], command
    assert run_python(arguments[3:]).strip()


@pytest.mark.slow
def test_the_first_command_prints_what_stands_below_it() -> None:
    shown = re.search(r"```sh\npip install uv && uv run python (.*?)\n```\n\n```\n(.*?)```", README, re.S)
    assert shown is not None
    assert run_python(shlex.split(shown[1])).startswith(shown[2])


def run_python(arguments: list[str]) -> str:
    needs_default_checkpoint()
    # The interpreter of this environment: `uv run` would first look for a newer one.
    done = processes.run_python(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_paths_in_the_inventory_exist() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", README, re.M)
    assert rows
    assert [row for row in rows if not (PROJECT_ROOT / row).exists()] == []
