"""Functions with the descriptions that their authors gave them: what the tasks after RepoQA ask for.

    functions_in(CodeFile("dag.py", text), "python")    # [CodeFunction(name="topological_generations", …), …]

The code of a function is shown without its documentation, which is the question. What stands in a documentation behind
its first paragraphs (parameters, examples, references) is no part of the description.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ruler.generation.brace_functions import brace_functions
from ruler.generation.code_files import CodeFile

_MIN_WORDS, _MAX_DESCRIPTION = 8, 600
_MIN_NAME, _MIN_CODE_LINES = 6, 3
# Where the prose of a documentation ends: a section's heading, a field, an example.
_SECTION = re.compile(
    r"^\s*(?:"
    r"(?:parameters?|params?|args|arguments?|returns?|yields?|raises?|examples?|notes?|references?|see also|usage|"
    r"attributes?|other parameters|warnings?|warns|todo|for example)\s*:?\s*$"
    r"|(?:args|arguments|parameters|returns?|yields?|raises?|examples?|for example|e\.g\.|note|usage)\b[^.\n]*:"
    r"|-{3,}|={3,}|>>>|```|\.\. |:\w+|@\w+|\\\w+|<\w+"
    r")",
    re.IGNORECASE,
)
# A word of a name or a text: `getHTTPEdge_set2` has get, HTTP, Edge, set, 2.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class CodeFunction:
    """One function.

    Attributes:
        name: Its name.
        path: Path of its file, or what stands for it.
        code: Its code without documentation, from the first line on, without a line end behind it.
        description: What it does, in its author's words on one line; empty where it cannot be asked for.
    """

    name: str
    path: str
    code: str
    description: str

    @cached_property
    def tokens(self) -> Counter[str]:
        """How often every word and sign comes in the code."""
        return Counter(TOKEN.findall(self.code))

    def overlap(self, other: CodeFunction) -> float:
        """Share of words and signs that two functions have in common, 0..1 (Dice)."""
        common = (self.tokens & other.tokens).total()
        return 2 * common / max(self.tokens.total() + other.tokens.total(), 1)


def functions_in(file: CodeFile, language: str) -> list[CodeFunction]:
    """The functions of a file.

    Args:
        file: The file.
        language: A name of `code_files.LANGUAGES`.

    Returns:
        Top-level functions in Python, functions with a comment before them in the others, in the file's order.
    """
    found = _python_functions(file.text) if language == "python" else brace_functions(file.text, language)
    return [
        CodeFunction(name, file.path, code, described(name, documentation, code)) for name, code, documentation in found
    ]


def described(name: str, documentation: str, code: str, min_lines: int = _MIN_CODE_LINES) -> str:
    """The description by which a function can be asked for, on one line.

    Args:
        name: The function's name.
        documentation: Its documentation, without comment signs.
        code: Its code.
        min_lines: Shorter code is not asked for.

    Returns:
        The prose before the first section, field or example. Empty where it is too short to tell one function from
        others, too long, gives the name away, or where name or code are too short to be asked for.
    """
    lines: list[str] = []
    for line in documentation.strip().splitlines():
        if _SECTION.match(line):
            break
        lines.append(line)
    text = " ".join(" ".join(lines).split())
    asked = len(name) >= _MIN_NAME and not name.startswith("_") and code.count("\n") + 1 >= min_lines
    tells = len(text.split()) >= _MIN_WORDS and len(text) <= _MAX_DESCRIPTION
    return text if asked and tells and not gives_away(name, text) else ""


def gives_away(name: str, description: str) -> bool:
    """Whether a description holds a function's name, as it is or in its words.

    `edge_boundaries` and `getEdgeBoundary` are both in "Returns the edge boundaries of a set": a name's words may be
    inflected, and a first `get`, `is` or `has` may be missing.
    """
    said = [word.lower() for word in _WORD.findall(description)]
    if "".join(_WORD.findall(name)).lower() in "".join(said):
        return True
    words = [word.lower() for word in _WORD.findall(name)]
    if len(words) > 1 and words[0] in ("get", "is", "has"):
        words = words[1:]
    stems = [word if len(word) < 4 else word.removesuffix("ies").removesuffix("s").removesuffix("y") for word in words]
    places = range(len(said) - len(stems) + 1)
    return any(all(said[at + number].startswith(stem) for number, stem in enumerate(stems)) for at in places)


def _python_functions(text: str) -> Iterator[tuple[str, str, str]]:
    """(name, code, documentation) of the top-level functions that stay code without their docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody's strings
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    lines = text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            code = without_docstrings(node, lines, start)
            if code is not None:
                yield node.name, code, ast.get_docstring(node) or ""


def without_docstrings(node: ast.AST, lines: list[str], start: int) -> str | None:
    """The lines of a node without the docstrings in it.

    Args:
        node: A function.
        lines: The file's lines.
        start: Number of the first line wanted, from 1.

    Returns:
        None where a docstring cannot be taken out line by line: it is all there is, or shares a line with code.
    """
    end: int = getattr(node, "end_lineno", start)
    left_out: set[int] = set()
    for inner in ast.walk(node):
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = inner.body[0]
        if not (
            isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        ):
            continue
        last = first.end_lineno or first.lineno
        alone = lines[first.lineno - 1][: first.col_offset].isspace()
        if len(inner.body) == 1 or not alone or inner.body[1].lineno <= last:
            return None
        left_out.update(range(first.lineno, last + 1))
        while last < end and not lines[last].strip():  # blank lines behind it
            last += 1
            left_out.add(last)
    kept = [lines[number - 1] for number in range(start, end + 1) if number not in left_out]
    return textwrap.dedent("\n".join(kept)).strip("\n")
