"""English sentence boundaries by the Punkt rules, without a download and without importing NLTK (which takes a second).

RULER hides its needles between the sentences of an essay, so a benchmark file depends on every single boundary. The
rules here are those of NLTK 3.10's Punkt tokenizer with its English parameters, held to it by tests. They are applied
to text whose whitespace is single spaces (`re.sub(r"\\s+", " ", text)`), the only kind RULER makes.

    SentenceSplitter().split("Dr. Who came. He left.")       # ['Dr. Who came.', 'He left.']

Source: Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary Detection", 2006; nltk.tokenize.punkt.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

from utils.errors import DatasetError

ENGLISH = Path(__file__).parents[1] / "punkt_english"

_CLOSERS = "\u2018\u2019\u201c\u201d\u00ab\u00bb"
_NON_WORD = rf"[)\";}}\]*:@'({{\[{_CLOSERS}?!]"
_MULTI = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
# A character that may end a sentence, seen with what follows: other punctuation, or a space and the next word.
_CANDIDATE = re.compile(rf"[.?!](?=(?P<after>{_NON_WORD}|\s+(?P<next>\S+)))")
_TOKEN = re.compile(
    rf"{_MULTI}|(?=[^(\"`{{\[:;&\#*@)}}\]\-,])\S+?(?=\s|$|{_NON_WORD}|{_MULTI}|,(?=$|\s|{_NON_WORD}|{_MULTI}))|\S"
)
# Closing punctuation behind a boundary belongs to the sentence before it.
_REALIGN = re.compile(rf"[\"')\]}}{_CLOSERS}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_ELLIPSIS = re.compile(r"\.\.+$")
_NUMBER = re.compile(r"^-?[.,]?\d[\d,.\-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")

# Flags of ortho_context.tab: where a word was seen in the training text, and in which case.
_BEGIN_UPPER, _MIDDLE_UPPER, _UNKNOWN_UPPER = 1 << 1, 1 << 2, 1 << 3
_BEGIN_LOWER, _MIDDLE_LOWER, _UNKNOWN_LOWER = 1 << 4, 1 << 5, 1 << 6
_UPPER = _BEGIN_UPPER | _MIDDLE_UPPER | _UNKNOWN_UPPER
_LOWER = _BEGIN_LOWER | _MIDDLE_LOWER | _UNKNOWN_LOWER


class SentenceSplitter:
    """Splits text into sentences; remembers its decision for each pair of words around a candidate."""

    def __init__(self, folder: Path = ENGLISH) -> None:
        try:
            self._abbreviations = set(_lines(folder / "abbrev_types.txt"))
            self._starters = set(_lines(folder / "sent_starters.txt"))
            self._collocations = {tuple(line.split("\t")) for line in _lines(folder / "collocations.tab")}
            pairs = (line.split("\t") for line in _lines(folder / "ortho_context.tab"))
            self._orthography = {word: int(flags) for word, flags in pairs}
        except FileNotFoundError as error:
            raise DatasetError(f"the English sentence data is incomplete: {error.filename} does not exist") from None
        self._decisions: dict[str, bool] = {}

    def split(self, text: str) -> list[str]:
        """Sentences of `text`, without the spaces between them."""
        return [text[start:stop] for start, stop in self.spans(text)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end (characters, half-open) of each sentence of `text`."""
        slices = self._slices(text)
        spans = []
        shift = 0  # closing punctuation at the start of this slice that went to the sentence before
        for (start, stop), following in zip(slices, [*slices[1:], None], strict=True):
            start += shift
            shift = 0
            if following and (closing := _REALIGN.match(text[following[0] : following[1]])):
                spans.append((start, following[0] + len(closing.group().rstrip())))
                shift = closing.end()
            elif text[start:stop]:
                spans.append((start, stop))
        return spans

    def _slices(self, text: str) -> list[tuple[int, int]]:
        """Raw sentences, before closing punctuation is moved."""
        slices, start = [], 0
        for match, context in self._candidates(text):
            decision = self._decisions.get(context)
            if decision is None:
                decision = self._decisions[context] = self._ends_sentence(context)
            if decision:
                slices.append((start, match.end()))
                start = match.end() if match["next"] is None else match.start("next")
        slices.append((start, len(text.rstrip())))
        return slices

    @staticmethod
    def _candidates(text: str) -> list[tuple[re.Match[str], str]]:
        """Candidates with the word before and what follows; of those in one word, the last."""
        found: list[tuple[re.Match[str], str]] = []
        pending: tuple[re.Match[str], int] | None = None
        begin, end = 0, 0  # the word before the pending candidate
        for match in _CANDIDATE.finditer(text):
            space = text.rfind(" ", end, match.start())
            word_begin = space + 1 if space > end else begin
            if pending and end <= word_begin:
                found.append((pending[0], text[begin:end] + pending[0].group() + pending[0]["after"]))
            pending = (match, word_begin)
            begin, end = word_begin, match.start()
        if pending:
            found.append((pending[0], text[begin:end] + pending[0].group() + pending[0]["after"]))
        return found

    def _ends_sentence(self, context: str) -> bool:
        """Whether a token of `context` other than the last ends a sentence."""
        tokens = _TOKEN.findall(context)
        return any(self._is_break(token, following) for token, following in pairwise(tokens))

    def _is_break(self, token: str, following: str) -> bool:
        ends, abbreviation = self._by_type(token)
        if not token.endswith("."):
            return ends
        kind = _type(token)
        kind = kind[:-1] if len(kind) > 1 and kind.endswith(".") else kind
        next_kind = _type(following)
        if self._by_type(following)[0] and len(next_kind) > 1:
            next_kind = next_kind.removesuffix(".")
        if (kind, next_kind) in self._collocations:
            return False
        initial = _INITIAL.match(token) is not None
        starts = self._starts_sentence(following, next_kind)
        if (abbreviation or _ELLIPSIS.match(token)) and not initial:
            if starts is True:
                return True
            if following[0].isupper() and next_kind in self._starters:
                ends = True
        if initial or kind == "##number##":
            if starts is False:
                return False
            always_upper = following[0].isupper() and not self._orthography.get(next_kind, 0) & _LOWER
            if starts is None and initial and always_upper:
                return False
        return ends

    def _by_type(self, token: str) -> tuple[bool, bool]:
        """What a token is by itself: (ends a sentence, is an abbreviation)."""
        if token in {".", "?", "!"}:
            return True, False
        if _ELLIPSIS.match(token) or not token.endswith(".") or token.endswith(".."):
            return False, False
        word = token[:-1].lower()
        abbreviation = word in self._abbreviations or word.split("-")[-1] in self._abbreviations
        return not abbreviation, abbreviation

    def _starts_sentence(self, token: str, kind: str) -> bool | None:
        """What the training text says about `token` as a first word; None where it says nothing."""
        if token in {";", ":", ",", ".", "!", "?"}:
            return False
        flags = self._orthography.get(kind, 0)
        if token[0].isupper() and flags & _LOWER and not flags & _MIDDLE_UPPER:
            return True
        if token[0].islower() and (flags & _UPPER or not flags & _BEGIN_LOWER):
            return False
        return None


@cache
def english_splitter() -> SentenceSplitter:
    """The splitter with the packaged English data, loaded once."""
    return SentenceSplitter()


def _type(token: str) -> str:
    return _NUMBER.sub("##number##", token.lower())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
