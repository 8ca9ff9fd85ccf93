"""`python -m utils.harness`: the command of lm-evaluation-harness, with our model and our tasks in it.

    python -m utils.harness --model code-llava --tasks memory_vt --limit 20

All arguments are lm-eval's own; `lm_eval` comes with the extra `lm-eval`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from utils.cli import EXIT_OK, HelpFormatter, run_command
from utils.errors import ConfigError

logger = logging.getLogger(__name__)

TASKS = Path(__file__).with_name("tasks")
_EXAMPLES = """\
examples:
  uv run --extra lm-eval python -m utils.harness --model code-llava --tasks memory_niah_single_1,memory_vt --limit 20 \\
      --metadata max_seq_lengths=[1024] --model_args chunk_size=8
  uv run --extra lm-eval python -m utils.harness --model code-llava --tasks memory_lookup --apply_chat_template \\
      --model_args chunk_size=4,expand=1/16 --batch_size 8 --output_path results/lookup
  uv run --extra lm-eval python -m utils.harness --model code-llava --tasks longbench_hotpotqa \\
      --model_args auto_memory=500,too_long=empty
  uv run --extra lm-eval python -m utils.harness ls tasks
  uv run --extra lm-eval python -m utils.harness run --help          # lm-eval's own flags

--model_args of code-llava:
  checkpoint, chunk_size, expand, expand_tokens, expand_policy, auto_memory=<fewest encoder tokens>, device, dtype,
  batch_size, max_gen_toks, too_long=error|empty, cache=True|False (docs/evaluation.md says what each does)"""


def build_parser() -> argparse.ArgumentParser:
    """What `--help` shows; lm-eval reads the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.harness",
        description="Run lm-evaluation-harness with the model code-llava and the tasks memory_*.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="ARGUMENT", help="lm-eval's own: run (default), ls, validate, …"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if argv is None else argv
    # What follows "--" is passed on, flags too.
    return run_command(build_parser(), _run, given if given in (["-h"], ["--help"]) else ["--", *given])


def _run(args: argparse.Namespace) -> int:
    if not args.arguments:
        build_parser().print_help()
        return EXIT_OK
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed: run `uv sync --extra lm-eval`, or `pip install lm-eval`")
    # Late: `--help` needs neither lm-eval nor torch.
    from lm_eval.__main__ import cli_evaluate

    import utils.harness.lm  # noqa: F401 - registers the model

    before, sys.argv = sys.argv, ["lm-eval", *with_tasks(args.arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return EXIT_OK


def with_tasks(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments with our folder of tasks, unless they name another folder or are a bare command."""
    if len(arguments) == 1:
        return [*arguments]
    if _value_of(arguments, "--include_path") or _configured(_value_of(arguments, "--config", "-C")):
        logger.info("an include_path is given: name tasks of this project by their file, as %s/memory_vt.yaml", TASKS)
        return [*arguments]
    return [*arguments, "--include_path", str(TASKS)]


def _value_of(arguments: Sequence[str], *flags: str) -> str | None:
    """The value of the last of such flags, written `--flag value` or `--flag=value`."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        if flag in flags:
            found = value if equals else following
    return found


def _configured(path: str | None) -> bool:
    """Whether a settings file of lm-eval names a folder of tasks; what is wrong with the file it says itself."""
    if path is None:
        return False
    try:
        settings = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and bool(settings.get("include_path"))


if __name__ == "__main__":
    raise SystemExit(main())
