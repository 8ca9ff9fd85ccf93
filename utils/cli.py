"""What every command shares: parser style, logging on stderr, exit codes, `--json`, error printing.

Results go to stdout, everything else to stderr. Exit codes: 0 ok, 1 `error: …`, 2 usage (argparse), 3 finished with
failed rows, 130 Ctrl-C. This module knows no torch, so that `--help` stays fast.

    def main(argv: list[str] | None = None) -> int:
        return run_command(build_parser(), run, argv)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import CodeLlavaError
from utils.files import json_text

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_FAILED_ROWS = 3
EXIT_INTERRUPTED = 130

# All but newline and tab, with those that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's examples as written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)


def make_parser(
    description: str, examples: str = "", prog: str | None = None, *, verbose_rows: bool = False
) -> argparse.ArgumentParser:
    """Build a parser in the house style with the flags that all commands have.

    Args:
        description: One sentence about the command.
        examples: Shell lines shown below the flags.
        prog: Name in the usage line; argparse's own choice without it.
        verbose_rows: `--verbose` takes a number of rows to show, as published evaluators have it.
    """
    epilog = f"examples:\n{examples.rstrip()}" if examples else None
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=HelpFormatter, allow_abbrev=False
    )
    if verbose_rows:
        parser.add_argument("--verbose", type=int, default=0, metavar="N", help="show the first N rows (default: 0)")
    else:
        parser.add_argument("--verbose", action="store_true", help="log details on stderr")
    return parser


def configure_logging(verbose: bool = False) -> None:
    """Send log records to stderr, once; `verbose` shows our own debug records."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.DEBUG if verbose else logging.INFO
    for name in ("utils", "general", "ruler", "ruler_minimal", "__main__"):
        logging.getLogger(name).setLevel(level)
    if not verbose:
        # Other libraries' notices would stand between the result and its reader.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore", category=FutureWarning)


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: list[str] | None = None
) -> int:
    """Parse `argv`, run the command and turn its outcome into an exit code.

    A `CodeLlavaError` or `OSError` becomes one `error: …` line on stderr and exit code 1; Ctrl-C becomes 130. Anything
    else is a bug of ours and keeps its traceback. What a terminal cannot show is escaped; a result that standard output
    cannot take (a full disk) is an error, one that nobody wants to read (`| head`, `>&-`) is none.
    """
    _prepare_streams()
    try:
        code = _outcome(parser, run, argv)
    finally:
        lost = _flush_stdout()
    return _fail(f"{lost.strerror}: standard output") if lost is not None and code == EXIT_OK else code


def print_json(value: Any) -> None:
    """Write one JSON object as one line to stdout."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(json_text(value, encoding=encoding) + "\n")
    sys.stdout.flush()


def describe_rows(result: Mapping[str, Any]) -> str:
    """What stands for a memory, as `14 latents + 5 rows of text, ratio 3.11`, of a result with these counts."""
    text = f" + {result['text_rows']} rows of text" if result["text_rows"] else ""
    return f"{result['num_latents']} latents{text}, ratio {result['ratio']}"


def printable(text: str) -> str:
    """Text for a terminal: control characters, which a file's name or a server's answer may hold, are escaped."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _outcome(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: list[str] | None) -> int:
    try:
        args = parser.parse_args(argv)
        configure_logging(getattr(args, "verbose", False))
        return run(args)
    except CodeLlavaError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return EXIT_OK  # the reader (`| head`) is gone
    except OSError as error:
        if not error.filename:
            return _fail(str(error))
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        return _fail(f"{error.strerror or error}: {name}".replace("\n", "\\n"))
    except KeyboardInterrupt:
        _complain("\ninterrupted\n")
        return EXIT_INTERRUPTED


def _prepare_streams() -> None:
    """Let both streams take any text, also where they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w", errors="backslashreplace"))  # noqa: SIM115 - to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_stdout() -> OSError | None:
    """Hand over what is still in memory; returns why that failed, unless the reader is gone."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Else the interpreter tries again at its exit, and complains in its own words.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None if isinstance(error, BrokenPipeError) else error
    return None


def _fail(message: str) -> int:
    _complain(f"error: {printable(message)}\n")
    return EXIT_ERROR


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody can be told
        sys.stderr.write(text)


def _to_root(record: logging.LogRecord) -> bool:
    """Leave a record to the root's handlers, which write to stderr, in place of its logger's own."""
    logging.getLogger().handle(record)
    return False


# DeepSpeed, which accelerate imports where it is installed, gives its logger a handler on stdout.
logging.getLogger("DeepSpeed").addFilter(_to_root)
