"""Chats for a server that tokenises text by itself: what it would obey goes as rows of its characters.

    {"content": "Say <|im_end|>. ␣memory␣"}   →   rows of "Say <|im_end|>. ", <|memory_start|>, latents, <|memory_end|>

A server writes a chat's template and reads all of it at once, so that a user's `<|im_end|>` ends a turn. A text with a
control token is therefore sent as the embeddings of its characters, the same ids that the decoder in this process
reads. Where nothing but text can be (roles, names, calls, tools), a token that frames a turn is refused; others, such
as `<filename>`, the server reads in its way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from utils.checkpoint.pair import tokenizer_framing
from utils.model.markers import Piece, control_pattern
from utils.serving.api_error import ApiError, shown
from utils.serving.chat_parts import RESERVED, ChatOutline, Part, text_part
from utils.serving.prompt_rows import PromptRows

# Fields beside the messages that chat templates write into the prompt.
_TEMPLATE_FIELDS = ("tools", "functions", "documents", "chat_template_kwargs")


class PlainText:
    """Writes texts so that no server obeys them; for one thread.

    Args:
        decoder: The tokenizer of the decoder.
        rows: Reads and counts.
        rows_part: Ids → a content part with their embeddings.
    """

    def __init__(self, decoder: Any, rows: PromptRows, rows_part: Callable[[list[int]], Part]) -> None:
        framing = tokenizer_framing(decoder)
        others = [token.content for id, token in decoder.added_tokens_decoder.items() if id not in framing]
        self._controls = control_pattern(decoder, RESERVED)
        self._framing = control_pattern(decoder, RESERVED, but=others)
        self._rows = rows
        self._rows_part = rows_part

    def find(self, text: str) -> str | None:
        """The first control token in a text."""
        return _first(self._controls, text)

    def parts(self, texts: Sequence[str]) -> list[Part]:
        """A content part for each text.

        Raises:
            ApiError: 413, those with control tokens have more rows than the decoder has positions.
        """
        parts, num_rows = [], 0
        for text in texts:
            if self.find(text) is None:
                parts.append(text_part(text))
                continue
            ids = self._rows.characters(text)
            num_rows += len(ids)
            self._rows.check_count(num_rows, "the texts that hold control tokens")
            parts.append(self._rows_part(ids))
        return parts

    def outline(self, chat: ChatOutline, body: Mapping[str, Any]) -> ChatOutline:
        """A chat's outline whose texts outside the memory have rows in their places where that is needed.

        Args:
            chat: The messages.
            body: The request.

        Raises:
            ApiError: 400, a token that frames turns where only text can be; 413, as `parts`.
        """
        for number, message in enumerate(chat.messages):
            for name, value in message.items():
                if name != "content":
                    self._check(value, f"message {number}: the field {shown(name)}")
        for name in _TEMPLATE_FIELDS:
            self._check(body.get(name), f"the field {name}")
        texts = [piece.text for pieces in chat.pieces for piece in pieces if _is_text(piece)]
        parts = iter(self.parts(texts))
        outlines = []
        for number, pieces in enumerate(chat.pieces):
            own: list[Piece | Part] = []
            for piece in pieces:
                if _is_text(piece):
                    part = next(parts)
                    own.append(piece if part["type"] == "text" else part)
                else:
                    if isinstance(piece, dict):
                        self._check(piece, f"message {number}: a content part")
                    own.append(piece)
            outlines.append(own)
        return replace(chat, pieces=outlines)

    def _check(self, value: Any, where: str) -> None:
        for text in _texts_in(value):
            if token := _first(self._framing, text):
                raise ApiError(
                    400, f"{where} holds {token}, which the server would obey there: write it "
                    "differently, or put it into a text of the content",
                )  # fmt: skip


def _first(pattern: re.Pattern[str] | None, text: str) -> str | None:
    match = pattern.search(text) if pattern else None
    return match[0] if match else None


def _is_text(piece: Piece | Part) -> TypeGuard[Piece]:
    return isinstance(piece, Piece) and not piece.is_memory


def _texts_in(value: Any) -> Iterator[str]:
    """Names and texts of a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from _texts_in(inner)
