"""What all commands share: exit codes, one error line, results apart from logs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_python
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
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (0, "")
    assert "odd device" in done.stderr


COMMAND = """
import logging, sys
from utils import cli
from utils.errors import PromptError

def run(args):
    name = "\\x1b[31mred\\x07 \\u202eabc \\u2192 \\U0001f600 \\udcff"
    if args.what == "json":
        cli.print_json({"name": name})
    elif args.what == "text":
        print(name)
    elif args.what == "many":
        for _ in range(30000):
            print("a line of text")
    elif args.what == "fail":
        logging.getLogger("utils").warning("file %s\\n\\tsecond line", name)
        raise PromptError(f"{name}\\n\\tsecond line")
    elif args.what == "os":
        raise FileNotFoundError(2, "No such file", name + "\\nerror: another")
    return cli.EXIT_FAILED_ROWS if args.what == "rows" else cli.EXIT_OK

parser = cli.make_parser("A command \\u2192 of a test.")
parser.add_argument("what")
sys.exit(cli.run_command(parser, run))
"""


def shell(what: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own, its streams as a shell gives them."""
    line = f'"$0" -c "$1" {what} {redirect}'
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    folder = Path(cli.__file__).parents[1]
    return subprocess.run(
        ["bash", "-c", line, sys.executable, COMMAND], capture_output=True, env=clean | environment, cwd=folder
    )


ENCODINGS = [
    {}, {"PYTHONIOENCODING": "latin-1:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
    pytest.param({"LC_ALL": "C"}, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_what_a_terminal_cannot_show_is_replaced(environment: dict[str, str]) -> None:
    for what in ("text", "json", "--help"):
        done = shell(what, **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        if what == "json":
            assert json.loads(done.stdout.decode()) == {"name": "\x1b[31mred\x07 \u202eabc → 😀 \udcff"}
    failed = shell("fail", **environment)
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert b"Traceback" not in failed.stderr


def test_no_control_character_of_others_reaches_the_terminal() -> None:
    for what, lines in (("fail", 4), ("os", 1)):
        got = shell(what).stderr.decode()
        assert got.count("\n") == lines
        assert not set(got) & set("\x1b\x07\u202e")
        assert "red" in got


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("what", ["text", "json", "many"])
def test_a_full_disk_at_stdout_is_one_error(what: str) -> None:
    done = shell(what, "> /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert (done.stderr.count(b"\n"), b"No space left" in done.stderr) == (1, True)


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "2> /dev/full"])
def test_nobody_listens(redirect: str) -> None:
    codes = {"many": 0, "rows": 3, "fail": 1}
    for what, code in codes.items():
        done = shell(what, redirect + "; exit ${PIPESTATUS[0]}")
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr
