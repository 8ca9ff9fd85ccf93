"""Functions and their descriptions: taken whole, documentation out, nothing that gives the name away."""

from __future__ import annotations

import ast

import pytest

from ruler.generation.code_files import CodeFile
from ruler.generation.functions import CodeFunction, described, functions_in, gives_away

PYTHON = '''"""A module."""

import functools


@functools.cache
def settle_accounts(
    ledger,
):
    """Move every open entry to the year in which
    it was paid, the oldest entries first.

    Args:
        ledger: The entries.
    """

    # the oldest first
    def oldest(entry):
        """Settle nothing."""
        return entry.year

    return sorted(ledger, key=oldest)


def only_documentation():
    """Do nothing at all, and say so in more than eight words of prose."""


def on_one_line(): "Say in eight words or more what is done."; return 3


class Method:
    def inside(self):
        """Return what is inside of this object, whatever it may be."""
        return self


async def undocumented(value):
    """Short."""
    total = value
    return total
'''
LONG = "Move every open entry to the year in which it was paid."
CODE = "def f():\n    x = 1\n    return x"


def test_python_functions_without_their_documentation() -> None:
    settled, undocumented = functions_in(CodeFile("books.py", PYTHON), "python")
    assert (settled.name, settled.path) == ("settle_accounts", "books.py")
    assert settled.description == (
        "Move every open entry to the year in which it was paid, the oldest entries first."
    )  # fmt: skip
    assert settled.code == (
        "@functools.cache\ndef settle_accounts(\n    ledger,\n):\n    # the oldest first\n    def oldest(entry):\n"
        "        return entry.year\n\n    return sorted(ledger, key=oldest)"
    )
    assert undocumented.description == ""
    assert ast.parse(undocumented.code)


def test_a_file_that_does_not_parse_has_no_functions() -> None:
    assert functions_in(CodeFile("old.py", "print 'hello'\n"), "python") == []


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("edge_boundaries", "Returns the edge boundary of a set."),
        ("getEdgeBoundary", "Returns the edge boundaries of a set."),
        ("is_prime", "Whether a number is prime."),
        ("settle_accounts", "Like `settle_accounts`, but faster."),
        ("HTTPServer_v2", "Starts the HTTP server v2."),
        ("median", "Returns the median."),
        ("remove_vowels", "Text removed: vowels. The word removevowels."),
    ],
)
def test_descriptions_that_give_the_name_away(name: str, description: str) -> None:
    assert gives_away(name, description)
    assert described(f"{name}_x", f"{LONG} {description}", CODE)  # another name is fine
    assert described(name, f"{LONG} {description}", CODE) == ""


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("is_prime", "Whether only 1 and the number itself divide it."),
        ("remove_vowels", "Returns the text without vowels; they are removed."),
        ("set_edge_attributes", "Gives values to the edges of a graph."),
    ],
)
def test_descriptions_that_do_not(name: str, description: str) -> None:
    assert not gives_away(name, description)


@pytest.mark.parametrize(
    "behind",
    [
        "Parameters\n----------\nG : graph",
        "Args:\n    ledger: The entries.",
        ":param ledger: The entries.",
        "@param {Array} ledger The entries.",
        ">>> f()\n1",
        "Examples\n--------",
        "Example: f() gives 1.",
        "```py\nf()\n```",
        ".. versionadded:: 3",
    ],
)
def test_a_description_ends_where_sections_begin(behind: str) -> None:
    assert described("settle", f"{LONG}\n{behind}", CODE) == LONG


@pytest.mark.parametrize(
    ("name", "documentation", "code"),
    [
        ("short", LONG, CODE),
        ("_private", LONG, CODE),
        ("settle", "Too few words.", CODE),
        ("settle", "word " * 200, CODE),
        ("settle", LONG, "def f():\n    return 1"),
    ],
)
def test_functions_that_are_not_asked_for(name: str, documentation: str, code: str) -> None:
    assert described(name, documentation, code) == ""


def test_overlap() -> None:
    one = CodeFunction("one", "a.py", "def one(a):\n    return a + 1", "")
    twin = CodeFunction("two", "a.py", "def two(a):\n    return a + 1", "")
    other = CodeFunction("three", "a.py", "for x in y: print(x)", "")
    assert one.overlap(one) == 1
    assert one.overlap(twin) == twin.overlap(one) == pytest.approx(0.9)
    assert one.overlap(other) < 0.5
