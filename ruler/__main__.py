"""`python -m ruler {prepare,predict,score,report,run}`: the whole benchmark from one command.

Each subcommand is a module with `EXAMPLES`, `add_arguments(parser)` and `run(args) -> int`; only the chosen one
is imported, so that help stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from utils.cli import HelpFormatter, make_parser, run_command

COMMANDS = {
    "prepare": ("ruler.generation.prepare", "generate datasets"),
    "predict": ("ruler.answering.predict", "answer the rows of prepared datasets"),
    "score": ("ruler.scoring.score", "score prediction folders"),
    "report": ("ruler.scoring.report", "compare scored runs in tables and pictures"),
    "run": ("ruler.run", "prepare, predict with text and memory, score and report in one go"),
}
EXAMPLES = """\
  python -m ruler run --output out --lengths 1024,2048 --num-samples 5 --chunk-size 4,8
  python -m ruler predict --help"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser.

    Args:
        command: The subcommand whose flags are wanted; the others are only named. None declares them all.
    """
    parser = make_parser("RULER: long-context tasks, answered from text or from memory.", EXAMPLES, "python -m ruler")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (path, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, formatter_class=HelpFormatter, allow_abbrev=False)
        sub.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="log details on stderr")
        if command in (None, name):
            module = importlib.import_module(path)
            sub.description = f"{summary.capitalize()}."
            sub.epilog = f"examples:\n{module.EXAMPLES.rstrip()}"
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if word in COMMANDS), "")
    return run_command(build_parser(command), lambda args: args.run(args), argv)


if __name__ == "__main__":
    sys.exit(main())
