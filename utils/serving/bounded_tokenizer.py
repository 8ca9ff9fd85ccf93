"""Tokenising no further than there is room: what cannot fit is found out early.

    ids = ids_within(tokenizer, text, limit=8192)       # None: more than 8192 ids

A tokenizer needs some hundred bytes of memory for each byte of text, and a second for each megabyte.
"""

from __future__ import annotations

from typing import Any

from utils.model.prompt import with_one_beginning

# Ids before a cut that the text behind it could have changed.
_UNSURE_IDS = 64
# Characters of text that are looked at for each id there is room for, at first; most tokens are shorter.
_CHARACTERS_PER_ID = 4
_LEAST_CHARACTERS = 4096


def ids_within(tokenizer: Any, text: str, limit: int, *, special_tokens: bool = False) -> list[int] | None:
    """The ids of a text; None where they are more than `limit`."""
    ids = first_ids(tokenizer, text, limit, special_tokens=special_tokens)
    return ids if len(ids) <= limit else None


def first_ids(tokenizer: Any, text: str, limit: int, *, special_tokens: bool = False) -> list[int]:
    """The ids of a text; of one that has more than `limit`, its first ones, more than `limit` of them."""
    return _beginning(tokenizer, text, limit, special_tokens=special_tokens)[0]


def first_part(tokenizer: Any, text: str, limit: int) -> str:
    """The text that `first_ids` looks at."""
    return text[: _beginning(tokenizer, text, limit)[1]]


def _beginning(tokenizer: Any, text: str, limit: int, *, special_tokens: bool = False) -> tuple[list[int], int]:
    """The ids that are sure, and the number of characters they were made from."""
    size = max(_LEAST_CHARACTERS, _CHARACTERS_PER_ID * limit)
    while True:
        ids = list(tokenizer(text[:size], add_special_tokens=special_tokens)["input_ids"])
        if special_tokens:
            ids = with_one_beginning(ids, tokenizer)
        if size >= len(text):
            return ids, len(text)
        if len(ids) - _UNSURE_IDS > limit:
            return ids[:-_UNSURE_IDS], size
        size *= 4
