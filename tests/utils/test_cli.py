"""What all commands share: exit codes, one error line, results apart from logs."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from utils import cli
from utils.errors import CodeLlavaError, PromptError, first_line


def run(outcome: Any, *argv: str) -> int:
    """Run a command that returns `outcome`, or raises it."""

    def command(args: argparse.Namespace) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return cli.run_command(cli.make_parser("A command.", examples="  do it"), command, list(argv))


@pytest.mark.parametrize(
    ("outcome", "code", "err"),
    [
        (cli.EXIT_OK, 0, ""),
        (cli.EXIT_FAILED_ROWS, 3, ""),
        (PromptError("no good"), 1, "error: no good\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: No such file or directory: x.txt\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_outcomes(outcome: Any, code: int, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(outcome) == code
    assert capsys.readouterr() == ("", err)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="ours"):
        run(KeyError("ours"))


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(0, "--nonsense")
    assert left.value.code == cli.EXIT_USAGE
    with pytest.raises(SystemExit) as left:
        run(0, "--help")
    assert left.value.code == 0
    assert "examples:\n  do it\n" in capsys.readouterr().out


def test_abbreviated_flags_are_refused() -> None:
    with pytest.raises(SystemExit):
        run(0, "--verb")


@pytest.mark.parametrize(("flags", "level"), [([], logging.INFO), (["--verbose"], logging.DEBUG)])
def test_verbose_shows_our_details(flags: list[str], level: int) -> None:
    assert run(0, *flags) == 0
    assert logging.getLogger("utils").level == level


def test_json_is_one_line_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_json({"é": "a\nb"})
    out, err = capsys.readouterr()
    assert (json.loads(out), out.count("\n"), err) == ({"é": "a\nb"}, 1, "")
    assert "é" in out


def test_first_lines_of_other_libraries_messages() -> None:
    assert first_line(ValueError("\n  one  \ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


def test_one_family() -> None:
    from utils import errors

    family = [x for x in vars(errors).values() if isinstance(x, type)]
    assert len(family) == 7
    assert all(issubclass(error, CodeLlavaError) for error in family)


@pytest.mark.slow
def test_what_deepspeed_logs_stays_off_stdout() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: uv sync --extra deepspeed")
    code = "import utils.cli; import deepspeed.utils as d; d.logger.warning('odd device')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "odd device" in done.stderr
