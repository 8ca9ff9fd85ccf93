"""The README's commands run as they stand there, and what all documents name exists.

A line with `# needs …` asks for what a test machine lacks.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.marks import needs_default_checkpoint
from utils.files import PROJECT_ROOT

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
TRACKED = subprocess.run(["git", "ls-files"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False).stdout
DOCUMENTS = [name for name in TRACKED.splitlines() if name.endswith(".md") and not name.startswith("shared/")]
# Folders in which a path in a document may begin.
ROOTS = ("utils/", "general/", "ruler/", "ruler_minimal/", "tests/", "docs/", ".ci/")


def commands() -> list[str]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    return [
        line for line in lines if line.startswith("uv run ") and "# needs" not in line and "pytest" not in line.split()
    ]


COMMANDS = commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3
    assert len(SHOWN) == 2


# Commands with what they print below them.
SHOWN = re.findall(r"```sh\n(?:pip install uv && )?(uv run python [^\n]*)\n```\n\n```\n(.*?)```", README, re.S)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    assert run_python(arguments_of(command)).strip()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("command", "printed"), SHOWN)
def test_a_command_prints_what_stands_below_it(command: str, printed: str, dtype: str) -> None:
    expected = ".*".join(map(re.escape, printed.split("…")))  # seconds differ
    assert re.fullmatch(expected, run_python([*arguments_of(command), "--dtype", dtype]))


def arguments_of(command: str) -> list[str]:
    """What a command passes to Python, as a shell reads it."""
    inner = re.search(r"\$\(uv run python (.*?)\)(?=\")", command)
    if inner:
        command = command.replace(inner[0], run_python(shlex.split(inner[1])).strip())
    arguments = shlex.split(command, comments=True)
    assert arguments[:3] == ["uv", "run", "python"], command
    return arguments[3:]


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_in_documents_exist(document: str) -> None:
    text = (PROJECT_ROOT / document).read_text(encoding="utf-8")
    named = {word for word in re.findall(r"[\w./-]+", text) if word.startswith(ROOTS) and "..." not in word}
    paths = {
        PROJECT_ROOT / word.rstrip(".:") for word in named if re.search(r"\.(py|sh|md|ya?ml|json|png)\.?$|/$", word)
    }
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    paths |= {Path(PROJECT_ROOT / document).parent / link for link in links}
    assert sorted(str(path) for path in paths if not path.exists()) == []
