"""Token ids one by one → text as soon as it is certain: whole characters, and nothing that may begin a stop string."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

_UNFINISHED = "\ufffd"


def decode_answer(tokenizer: Any, ids: Iterable[int], hidden: Collection[int]) -> str:
    """The text of an answer, without the tokens that are no text."""
    return str(tokenizer.decode([token for token in ids if token not in hidden]))


class TextPieces:
    """The text of one answer.

    Args:
        tokenizer: Decodes.
        hidden: Ids that are no text, `utils.checkpoint.pair.framing_tokens`.
        stop: Strings that end the text; they and what follows are left out.

    Attributes:
        stopped: A stop string was met.
        text: What was given out so far.
        num_tokens: Tokens taken.
    """

    def __init__(self, tokenizer: Any, hidden: Collection[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.text = ""
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._stop = stop
        self._ids: list[int] = []
        # Tokens are decoded together with some before them: a tokenizer may write a word's first token differently.
        self._context = self._shown = 0
        self._held = ""

    @property
    def num_characters(self) -> int:
        """Characters so far, those that are held back included."""
        return len(self.text) + len(self._held)

    def add(self, token: int, *, is_end: bool = False) -> str:
        """Take a token; returns the text that became certain with it. That of an end token is none."""
        self.num_tokens += 1
        if is_end:
            return ""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._release(text, last=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._release(self._new_text(), last=True)

    def _new_text(self) -> str:
        before, now = (self._decode(self._ids[self._context : end]) for end in (self._shown, len(self._ids)))
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode_answer(self._tokenizer, ids, self._hidden)

    def _release(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
        kept = 0 if last or found else max((_overlap(text, stop) for stop in self._stop), default=0)
        certain = min(found) if found else len(text) - kept
        self._held = text[certain:]
        self.text += text[:certain]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
