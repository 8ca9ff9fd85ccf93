"""What every command shares: parser style, logging on stderr, exit codes, `--json`, error printing.

Results go to stdout, everything else to stderr. Exit codes: 0 ok, 1 `error: …`, 2 usage (argparse), 3 finished with
failed rows, 130 Ctrl-C. This module knows no torch, so that `--help` stays fast.

    def main(argv: list[str] | None = None) -> int:
        return run_command(build_parser(), run, argv)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from utils.errors import CodeLlavaError

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_FAILED_ROWS = 3
EXIT_INTERRUPTED = 130


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
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
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
    else is a bug of ours and keeps its traceback.
    """
    args = parser.parse_args(argv)
    configure_logging(getattr(args, "verbose", False))
    try:
        return run(args)
    except CodeLlavaError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader (`| head`) is gone. Silence the interpreter's own complaint at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return EXIT_INTERRUPTED


def print_json(value: Any) -> None:
    """Write one JSON object as one line to stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return EXIT_ERROR


def _to_root(record: logging.LogRecord) -> bool:
    """Leave a record to the root's handlers, which write to stderr, in place of its logger's own."""
    logging.getLogger().handle(record)
    return False


# DeepSpeed, which accelerate imports where it is installed, gives its logger a handler on stdout.
logging.getLogger("DeepSpeed").addFilter(_to_root)
