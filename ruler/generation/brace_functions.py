"""Functions of C++ and JavaScript files: a comment, a head, a body in braces.

Read without a compiler. Comments, strings and JavaScript's regular expressions are blanked first, so that braces and
names in them do not count. A function is taken only where nothing is doubtful: its comment stands directly before it,
its body closes, and it has neither preprocessor lines nor commented functions of its own inside. The others are left
out, which costs functions, never a wrong answer.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

_LITERALS = re.compile(
    r"//[^\n]*|/\*.*?\*/"
    r'|R"(?P<mark>[^\s()\\]{0,16})\(.*?\)(?P=mark)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9A-Fa-f])'(?:\\.|[^'\\\n])*'"
    r"|`(?:\\.|[^`\\])*`"
    r"|/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/",
    re.DOTALL,
)
# A JavaScript slash begins a regular expression behind these, a division behind anything else.
_BEFORE_PATTERN = re.compile(r"(?:^|[(,=:\[!&|?{};+*<>~^-]|\breturn|\btypeof)\s*$")
_COMMENT = re.compile(r"/\*\*?(?!/)(?P<block>.*?)\*/|(?P<lines>(?:^[ \t]*//[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
_JS_HEAD = re.compile(r"\s*(?:export\s+(?:default\s+)?)?(?:async\s+)?function\s*\*?\s*(?P<name>[A-Za-z_$][\w$]*)\s*\(")
_CPP_HEAD = re.compile(
    r"\s*(?:template\s*<[^{};]*>\s*)?(?P<before>(?:[\w:<>,&*\s]|\[\[\w+\]\])*?[\w>&*]\s*[\s&*])"
    r"(?P<name>~?[A-Za-z_]\w*)\s*\("
)
_NO_TYPE = re.compile(r"\b(?:class|struct|enum|union|namespace|using|typedef|return|else|new|case|operator|define)\b")
_NO_NAME = frozenset(
    {"if", "for", "while", "switch", "catch", "sizeof", "decltype", "noexcept", "alignas", "requires", "operator"}
)
_AFTER_ARGUMENTS = re.compile(r"\s*(?:const\b|noexcept\b|override\b|final\b|->\s*[\w:<>,&*\s]+|\s)*$")
_SIGNS = re.compile(r"^[ \t]*(?:///?|\*+)[!<]?[ \t]?")


def brace_functions(text: str, language: str) -> Iterator[tuple[str, str, str]]:
    """(name, code, documentation) of the functions with a comment directly before them.

    Args:
        text: A file.
        language: `cpp` or `javascript`.
    """
    masked = masked_text(text, language)
    for comment in _COMMENT.finditer(text):
        if masked[comment.start() : comment.end()].strip():
            continue  # a "/*" within a string, with code behind it
        start = comment.end()
        gap = text[comment.start() + len(comment.group().rstrip()) : start] + _leading_space(text, start)
        brace = masked.find("{", start)
        name = _name(masked[start:brace], language) if gap.count("\n") <= 1 and brace > 0 else None
        end = closing_brace(masked, brace) if name else None
        if name is None or end is None:
            continue
        body = text[brace:end]
        if re.search(r"^[ \t]*#", masked[brace:end], re.MULTILINE) or re.search(
            r"/\*\*|^[ \t]*///", body, re.MULTILINE
        ):
            continue
        indent = gap.rpartition("\n")[2]
        code = textwrap.dedent(indent + text[start:end].lstrip())
        yield name, code, _words(comment)


def masked_text(text: str, language: str) -> str:
    """The text with comments, strings and regular expressions as spaces; as long as before, line ends kept."""
    parts, done = [], 0
    for match in _literals(text, language):
        parts += [text[done : match.start()], re.sub(r"[^\n]", " ", match.group())]
        done = match.end()
    return "".join((*parts, text[done:]))


def _literals(text: str, language: str) -> Iterator[re.Match[str]]:
    position = 0
    while match := _LITERALS.search(text, position):
        position = match.end()
        token = match.group()
        if token[0] == "/" and token[1] not in "/*":
            before = text[max(match.start() - 40, 0) : match.start()]
            if language != "javascript" or not _BEFORE_PATTERN.search(before):
                position = match.start() + 1  # a division
                continue
        yield match


def closing_brace(masked: str, brace: int) -> int | None:
    """The end (exclusive) of the block that opens at `brace`; None where it does not close."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(masked, brace):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    return None


def _name(head: str, language: str) -> str | None:
    """The function's name in what stands before its brace; None where it is no function's head."""
    if any(sign in head for sign in ";}#") or head.count("(") != head.count(")"):
        return None
    if language == "javascript":
        match = _JS_HEAD.match(head)
        return match["name"] if match else None
    match = _CPP_HEAD.match(head)
    if match is None or _NO_TYPE.search(match["before"]) or match["name"] in _NO_NAME or match["name"].startswith("~"):
        return None
    return match["name"] if _AFTER_ARGUMENTS.fullmatch(head[head.rindex(")") + 1 :]) else None


def _leading_space(text: str, start: int) -> str:
    """The spaces and line ends from `start` on."""
    end = start
    while end < len(text) and text[end].isspace():
        end += 1
    return text[start:end]


def _words(comment: re.Match[str]) -> str:
    """A comment without its signs."""
    inner = comment["block"] if comment["block"] is not None else comment["lines"]
    return "\n".join(_SIGNS.sub("", line).rstrip() for line in inner.splitlines()).strip()
