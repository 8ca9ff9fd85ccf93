"""How an answer that should be a function's code is judged: right where it resembles that function, and no other more.

    value, strict = function_value(answer, row["outputs"], row["others"]["distractors"], "python")

After RepoQA: the first function of the answer must be nearer to the wanted one than to any other, by BLEU, and reach
0.8. Here it is compared with every function of the context, not with some, and with its comments. BLEU is over words
and signs of code, not over what spaces separate, and smoothed by one for runs of two and more, for short functions.

Source: Liu et al., "RepoQA", arXiv 2406.06025 (best match, threshold); Papineni et al., "BLEU" (ACL 2002); Lin and
Och, "ORANGE" (COLING 2004; the smoothing).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from ruler.generation.brace_functions import closing_brace, masked_text
from utils.errors import DatasetError

THRESHOLD = 0.8
_TOKEN = re.compile(r"\w+|[^\w\s]")
_MAX_RUN = 4
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|$)", re.DOTALL)
_DECORATOR = re.compile(r"^[ \t]*@", re.MULTILINE)
_PYTHON_HEAD = re.compile(r"^(?P<indent>[ \t]*)(?:async\s+)?def\s", re.MULTILINE)
# What may stand on lines of its own before the head: a template, a macro, a single word.
_BEFORE_HEAD = re.compile(r"(?:^[ \t]*(?:template\s*<[^{};]*>|[\w:<>&*]+)[ \t]*\n)+\Z", re.MULTILINE)
_BRACE_HEAD = re.compile(r"^[^\n(){}]*\w\s*\([^{};]*\{", re.MULTILINE)


def function_value(
    answer: str, references: Sequence[str], distractors: Sequence[str], language: str
) -> tuple[float, float]:
    """Judge an answer that should be the code of one function.

    Args:
        answer: What the model wrote; text around the function, such as a fence, is allowed.
        references: The wanted code, alone.
        distractors: The code of the other functions of the context.
        language: Of the code, a name of `ruler.generation.code_files.LANGUAGES`.

    Returns:
        1.0 or 0.0: the wanted function is the best match, with a BLEU of `THRESHOLD` or more; and the stricter
        verdict: the answer's function has the same words and signs.

    Raises:
        DatasetError: There is not exactly one reference.
    """
    if len(references) != 1:
        raise DatasetError(f"a row with {len(references)} references (`outputs`), expected one function: prepare again")
    # The wanted code goes through the same cut, so that where a body ends is never what tells the two apart.
    code, wanted = (first_function(text, language) for text in (answer, references[0]))
    likeness = bleu(code, wanted)
    best = likeness >= THRESHOLD and all(bleu(code, other) < likeness for other in distractors)
    return float(best), float(_TOKEN.findall(code) == _TOKEN.findall(wanted))


def first_function(answer: str, language: str) -> str:
    """The first function of an answer, from its first fence if it has one; the whole text where there is no function.

    Args:
        answer: Text.
        language: Of the code; in Python a body is what is indented below a `def`, else it is what braces enclose.
    """
    fence = _FENCE.search(answer)
    text = fence.group(1) if fence else answer
    return _python_function(text) if language == "python" else _brace_function(text, language)


def bleu(candidate: str, reference: str) -> float:
    """BLEU-4 of two codes over words and signs, 0..1; runs of two and more are smoothed by one."""
    ours, theirs = _TOKEN.findall(candidate), _TOKEN.findall(reference)
    if not ours or not theirs:
        return 0.0
    total = 0.0
    for length in range(1, _MAX_RUN + 1):
        runs, wanted = _runs(ours, length), _runs(theirs, length)
        smoothing = int(length > 1)
        common = (runs & wanted).total() + smoothing
        if not common:
            return 0.0
        total += math.log(common / (max(runs.total(), 1) + smoothing))
    # Precision alone would favour short answers.
    brevity = min(0.0, 1 - len(theirs) / len(ours))
    return math.exp(total / _MAX_RUN + brevity)


def _runs(tokens: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(length)), strict=False))


def _python_function(text: str) -> str:
    head = _PYTHON_HEAD.search(text)
    if head is None:
        return text
    lines = text[head.start() :].split("\n")
    end = next((number for number, line in enumerate(lines) if number and _ends_body(line, head["indent"])), len(lines))
    paragraph = text.rfind("\n\n", 0, head.start()) + 1
    decorator = _DECORATOR.search(text, paragraph, head.start())
    start = decorator.start() if decorator else head.start()
    return text[start : head.start()] + "\n".join(lines[:end]).rstrip()


def _ends_body(line: str, indent: str) -> bool:
    """Whether a line is outside; a bracket that closes the arguments of a head over several lines is not."""
    spaces = len(line.expandtabs()) - len(line.expandtabs().lstrip())
    return bool(line.strip()) and spaces <= len(indent.expandtabs()) and line.lstrip()[0] not in ")]}"


def _brace_function(text: str, language: str) -> str:
    masked = masked_text(text, language)
    head = _BRACE_HEAD.search(masked)
    if head is None:
        return text
    before = _BEFORE_HEAD.search(masked, 0, head.start())
    start = before.start() if before else head.start()
    return text[start : closing_brace(masked, head.end() - 1)]
