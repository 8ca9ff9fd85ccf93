"""How the lines of a text belong together, in any language: by indentation, and by what a definition looks like.

    outline = outline_of(["# file: a.py\\n", "class A:\\n", "    def f(self):\\n", "        return 1\\n"])
    outline.names          # [(), ("A",), ("f",), ()]
    outline.parents        # [-1, -1, 1, 2]         the definition around a line
    outline.files          # [-1, 0, 0, 0]          the line above that names the file

No syntax tree: an excerpt need not parse, and prose simply has no definitions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# What may stand before the word that defines: `export default async function f`, `pub(crate) fn f`.
_MODIFIERS = (
    r"(?:(?:export|default|declare|public|private|protected|internal|static|abstract|final|async|inline|extern|unsafe"
    r"|override|pub(?:\(\w+\))?)\s+)*"
)
_KEYWORDS = (
    r"(?:def|class|function\*?|func|fn|fun|struct|interface|enum|union|trait|impl|type|module|namespace|package"
    r"|protocol|object|record|const|let|var|val|#\s*define)"
)
_DEFINITION = re.compile(
    rf"{_MODIFIERS}{_KEYWORDS}\s+(?:\([^)]*\)\s*)?(?P<keyword>[\w$]+)"
    r"|(?P<assigned>[\w$.]+)\s*(?::[^=\n]*)?=(?![=>])"
    # An import binds its words; a heading is about them.
    r"|(?P<words>(?:import|from|use|using|#\s*include|require|open)\b|#{2,6}\s+\w)"
)
# Markdown; a single # begins a comment elsewhere. What follows is part of the section, however little it is indented.
_HEADING = re.compile(r"#{2,6}(?=\s+\w)")
_WORD = re.compile(r"\w+")
# `int f(int a) {`, `render(props) {`: looked for in lines that end so.
_BLOCK = re.compile(r"(?<![\w$~])([\w$~]++)\s*+\([^;]*\{\s*$")
_CONTROL = re.compile(r"}?\s*(?:if|for|while|switch|catch|else|elif|return|with|using|lock|do|try)\b")
# `# file: a/b.py`, `// src/x.js`, `# ---- a/b.py ----`, `<file path="a.c">`: marks, perhaps "file", and a path.
_FILE = re.compile(
    r"(?:[^\w\s](?:file|path|filename|source|\W)*|file(?:name)?\s*:\s*)(?:\.{0,2}/)?[\w@][\w.@+/\\-]*\.\w{1,8}\W*$",
    re.IGNORECASE,
)
_LONGEST_PATH = 200
_CLOSING = ")]}{"
_DEEPEST = 7  # more than a heading has signs
_COMMENT = ("#", "//", "/*", "*", "--", "@", ";", "<!--")


@dataclass(frozen=True, slots=True)
class Outline:
    """How pieces belong together.

    Attributes:
        names: What each piece defines; mostly nothing.
        parents: For each piece the number of the definition around it; -1 for none.
        files: For each piece the number of the line above that names its file; -1 for none.
        comments: Whether each piece is a comment or decorator right above the next line.
    """

    names: list[tuple[str, ...]]
    parents: list[int]
    files: list[int]
    comments: list[bool]


def outline_of(texts: Sequence[str]) -> Outline:
    """The outline of pieces that follow each other; only a line's first piece defines something."""
    names: list[tuple[str, ...]] = []
    parents: list[int] = []
    files: list[int] = []
    comments: list[bool] = []
    open_blocks: list[tuple[int, int]] = []  # indentation and number of the definitions around this line
    file, starts_line = -1, True
    for number, text in enumerate(texts):
        body = text.lstrip()
        own: tuple[str, ...] = ()
        if body and starts_line:
            indent = len(text) - len(body)
            if body[0] == "#" and (heading := _HEADING.match(text)):
                indent = len(heading[0]) - _DEEPEST
            # A closing bracket belongs to the block above, as in `) -> None:`.
            least = indent + 1 if body[0] in _CLOSING else indent
            while open_blocks and open_blocks[-1][0] >= least:
                open_blocks.pop()
            if indent == 0 and len(body) <= _LONGEST_PATH and _FILE.match(body):
                file, open_blocks = number, []
            else:
                own = _names(body)
        names.append(own)
        parents.append(open_blocks[-1][1] if open_blocks else -1)
        files.append(-1 if file == number else file)
        comments.append(body.startswith(_COMMENT) and text.count("\n") == 1)
        if own:
            open_blocks.append((indent, number))
        starts_line = text.endswith("\n")
    return Outline(names, parents, files, comments)


def _names(body: str) -> tuple[str, ...]:
    """What a line defines, without its indentation."""
    if found := _DEFINITION.match(body):
        if found.lastgroup == "words":
            return tuple(_WORD.findall(body))
        return (found[found.lastgroup or 0].rpartition(".")[2],)
    if "{" in body and body.rstrip().endswith("{") and not _CONTROL.match(body) and (found := _BLOCK.search(body)):
        return (found[1],)
    return ()
