"""Flags are a promise: a new, changed or removed one is a decision, written down in tests/data/flags.txt as well."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import pytest

from tests.test_commands import COMMANDS
from utils.files import PROJECT_ROOT

FROZEN = PROJECT_ROOT / "tests" / "data" / "flags.txt"
# Spellings that were published → the one that help and documents show first.
ALIASES = {
    "--base-url": "--server-url",
    "--max-new-tokens": "--max-tokens",
    "--model-path": "--checkpoint",
    "--output-dir": "--output",
    "--output-root": "--output",
    "--random-seed": "--seed",
    "--timeout-s": "--timeout",
}
PUBLISHED = "ruler/RULER/scripts/"  # their flags are upstream's


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command and subcommand with its parser."""
    for path in COMMANDS:
        name = str(path.relative_to(PROJECT_ROOT))
        module = importlib.import_module(".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts))
        yield from with_subcommands(name, module.build_parser())


def with_subcommands(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice, subparser in action.choices.items():
                yield from with_subcommands(f"{name} {choice}", subparser)


def spellings(parser: argparse.ArgumentParser) -> list[str]:
    """Of each argument all its spellings, the canonical one first: `--output|-o`, or `<name>` by position."""
    return [
        "|".join(action.option_strings) or f"<{action.dest}>"
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
    ]


def test_flags_are_those_written_down() -> None:
    found = "".join(f"{name}: {' '.join(spellings(parser))}\n" for name, parser in parsers())
    assert found == FROZEN.read_text(encoding="utf-8"), "a flag changed: is it wanted? Then write it down as well"


@pytest.mark.parametrize(("published", "canonical"), ALIASES.items())
def test_one_spelling_comes_first(published: str, canonical: str) -> None:
    for name, parser in parsers():
        for flag in spellings(parser):
            names = flag.split("|")
            if published in names and not name.startswith(PUBLISHED):
                assert names[0] == canonical, f"{name}: {flag}"
