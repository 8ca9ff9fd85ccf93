"""Questions about real code whose answers stand in it, found through the syntax tree.

    facts = find_facts(file.text)
    facts[0].about, facts[0].answer             # ("area",), "width * height"

A fact knows the lines that prove it, so that an excerpt can be cut around them.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_ANSWER_CHARS = 60
_COMMENT = re.compile(r"^\s*# (?P<text>\w.{8,58})$")

# kind → phrasings; {0} is what is asked about, {1} what narrows it down.
QUESTIONS = {
    "return": ("What does the function `{0}` return?", "Which expression does `{0}` return?"),
    "constant": ("What value is assigned to `{0}`?", "Which value does `{0}` get?"),
    "parameters": ("What are the parameters of `{0}`?", "Which parameters does the function `{0}` take?"),
    "default": (
        "What is the default value of `{1}` in `{0}`?",
        "Which default does the parameter `{1}` of `{0}` have?",
    ),
    "import": ("From which module is `{0}` imported?", "Where is `{0}` imported from?"),
    "base": ("Which class does `{0}` inherit from?", "What is the base class of `{0}`?"),
    "method": ("Which class defines the method `{0}`?", "In which class is `{0}` defined?"),
    "raise": ("Which exception does `{0}` raise?", "What does the function `{0}` raise?"),
    "comment": ("What does the comment before the line `{0}` say?",),
    "next_line": ("Which line comes right after `{0}`?", "What is the line after `{0}`?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that a file says.

    Attributes:
        kind: Which of `QUESTIONS` asks for it.
        about: What is asked about, and what narrows it down.
        answer: The answer as it stands in the file; empty where there is one that cannot be asked for: it has several
            lines or is long, or is not of the kind. Then it only makes others ambiguous.
        first: First line that is needed, counted from 0.
        last: Last line that is needed.
    """

    kind: str
    about: tuple[str, ...]
    answer: str
    first: int
    last: int


@lru_cache(maxsize=16384)
def find_facts(text: str) -> list[Fact]:
    """All facts of a file, in the order of its lines; none if it is not valid Python.

    Remembered, for builders draw the same files again and again.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in somebody's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = [*_tree_facts(tree, text), *_line_facts(text.splitlines())]
    return sorted(found, key=lambda fact: (fact.first, fact.kind, fact.about))


def names_defined(lines: Sequence[str]) -> list[str]:
    """Functions and classes that lines of a file define at the top level."""
    heads = [line.split("(")[0].split(":")[0].split() for line in lines if line.startswith(("def ", "class "))]
    return [head[1] for head in heads if len(head) == 2]


def is_askable(line: str) -> bool:
    """Whether a question can name this line, without its white space: neither trivial nor long, and code."""
    return 12 <= len(line) <= MAX_ANSWER_CHARS and "`" not in line and not line.startswith(("#", '"'))


def can_be_asked(fact: Fact, facts: list[Fact], first: int, stop: int) -> bool:
    """Whether lines `first` to `stop` hold the fact's answer and no other one to the same question."""
    if not fact.answer or not first <= fact.first <= fact.last < stop:
        return False
    return not any(
        other.kind == fact.kind
        and other.about == fact.about
        and other != fact
        and other.last >= first
        and other.first < stop
        for other in facts
    )


def _tree_facts(tree: ast.Module, text: str) -> Iterator[Fact]:
    lines = text.splitlines()

    def source(node: ast.AST) -> str:
        """The text of a node that stands on one line, else nothing."""
        if getattr(node, "lineno", 0) != getattr(node, "end_lineno", -1):
            return ""
        # Offsets of the syntax tree count bytes.
        line = lines[node.lineno - 1].encode()  # type: ignore[attr-defined]
        return line[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function_facts(node, source)
        elif isinstance(node, ast.ClassDef):
            at = node.lineno - 1
            if len(node.bases) == 1:
                yield _fact("base", (node.name,), source(node.bases[0]), at, at)
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("__"):
                    yield _fact("method", (item.name,), node.name, at, item.lineno - 1)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            plain = isinstance(node, ast.Assign) and len(targets) == 1
            answer = source(node.value) if plain and isinstance(node.value, ast.Constant) else ""
            for target in targets:
                yield _fact("constant", (source(target),), answer, node.lineno - 1, node.lineno - 1)
        elif isinstance(node, ast.ImportFrom) and node.lineno == node.end_lineno:
            for name in (name for name in node.names if name.name != "*"):
                module = "." * node.level + (node.module or "")
                yield _fact("import", (name.asname or name.name,), module, node.lineno - 1, node.lineno - 1)


def _function_facts(node: ast.FunctionDef | ast.AsyncFunctionDef, source: object) -> Iterator[Fact]:
    assert callable(source)
    at = node.lineno - 1
    arguments = [*node.args.posonlyargs, *node.args.args]
    last_argument = max((argument.end_lineno or 0 for argument in arguments), default=0)
    simple = not (node.args.vararg or node.args.kwarg or node.args.kwonlyargs)
    on_one_line = simple and last_argument == node.lineno
    yield _fact("parameters", (node.name,), ", ".join(a.arg for a in arguments) if on_one_line else "", at, at)
    with_default = arguments[len(arguments) - len(node.args.defaults) :] if node.args.defaults else []
    for argument, default in zip(with_default, node.args.defaults, strict=True):
        yield _fact("default", (node.name, argument.arg), source(default), at, default.lineno - 1)
    inner = list(ast.walk(node))
    returns = [child for child in inner if isinstance(child, ast.Return) and child.value is not None]
    for returned in returns:
        answer = source(returned.value) if len(returns) == 1 else ""
        yield _fact("return", (node.name,), answer, at, returned.lineno - 1)
    raises = [child for child in inner if isinstance(child, ast.Raise) and child.exc is not None]
    for raised in raises:
        answer = source(raised.exc.func) if len(raises) == 1 and isinstance(raised.exc, ast.Call) else ""
        yield _fact("raise", (node.name,), answer, at, raised.lineno - 1)


def _line_facts(lines: list[str]) -> Iterator[Fact]:
    stripped = [line.strip() for line in lines]
    counts: dict[str, int] = {}
    for line in stripped:
        counts[line] = counts.get(line, 0) + 1
    for at in range(len(lines) - 1):
        here, after = stripped[at], stripped[at + 1]
        comment = _COMMENT.match(lines[at])
        if comment and 8 <= len(after) <= MAX_ANSWER_CHARS and not after.startswith("#") and counts[after] == 1:
            whole = at == 0 or not stripped[at - 1].startswith("#")  # else the end of a longer one
            yield _fact("comment", (after,), comment["text"] if whole else "", at, at + 1)
        if is_askable(here) and counts[here] == 1 and len(after) >= 8:
            yield _fact("next_line", (here,), after, at, at + 1)


def _fact(kind: str, about: tuple[str, ...], answer: str, first: int, last: int) -> Fact:
    nameable = all(part and "`" not in part for part in about)
    usable = nameable and len(answer) <= MAX_ANSWER_CHARS and "\n" not in answer
    return Fact(kind=kind, about=about, answer=answer if usable else "", first=first, last=last)
