"""A tokenizer that reads no further than there is room: what cannot fit is found out early.

    ids = BoundedTokenizer(tokenizer).ids(text, limit=8192)       # None: more than 8192 ids

A tokenizer needs some hundred bytes of memory for each byte of text, and a second for each megabyte.
"""

from __future__ import annotations

from typing import Any

# Ids before a cut that the text behind it could have changed.
_UNSURE_IDS = 64
# Characters of text that are looked at for each id there is room for, at first; most tokens are shorter.
_CHARACTERS_PER_ID = 4
_LEAST_CHARACTERS = 4096


class BoundedTokenizer:
    """A Hugging Face tokenizer with a limit at each call; one thread at a time may use it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str, limit: int, *, special_tokens: bool = False) -> list[int] | None:
        """The ids of a text; None where they are more than `limit`."""
        ids = self.first_ids(text, limit, special_tokens=special_tokens)
        return ids if len(ids) <= limit else None

    def first_ids(self, text: str, limit: int, *, special_tokens: bool = False) -> list[int]:
        """The ids of a text; of one that has more than `limit`, its first ones, more than `limit` of them."""
        size = max(_LEAST_CHARACTERS, _CHARACTERS_PER_ID * limit)
        while size < len(text):
            ids = self._all(text[:size], special_tokens)
            if len(ids) - _UNSURE_IDS > limit:
                return ids[:-_UNSURE_IDS]
            size *= 4
        return self._all(text, special_tokens)

    def _all(self, text: str, special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])
