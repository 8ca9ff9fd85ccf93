"""Chat messages with memory markers: their spans, and the messages with something else in the spans' places.

    outline = outline_chat(messages)       # outline.spans: the texts between the markers
    outline.fill([[part, …], …])           # content parts for each span: latents and markers, or plain text
    outline.flat([text, …])                # contents as texts, as the local decoder's template takes them

Markers are looked for once. A message without memory stays as it was, strings included.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import PromptError
from utils.model.chat import chat_query
from utils.model.markers import MEMORY_END, MEMORY_START, PLACEHOLDER, Piece, has_markers, split_spans
from utils.serving.api_error import ApiError, shown

Part = dict[str, Any]
# vLLM refuses texts that hold it: where embeddings stand, it reads this token.
RESERVED = "<prompt_embeds>"
# The kind of a content part that holds them.
EMBEDS = "prompt_embeds"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoPart:
    """What became of a part of a chat that nobody marked (`auto_memory.py`).

    Attributes:
        message: Its message's number.
        characters: Its length.
        reason: Why it stays text; None for a part that became memory.
    """

    message: int
    characters: int
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOutline:
    """Messages in which the memory spans are still to be filled in.

    Attributes:
        messages: As they came.
        pieces: Each message's content as pieces of text and foreign parts, in order.
        spans: The spans' texts in order.
        auto: What became of each part; None where only markers count.
    """

    messages: list[dict[str, Any]]
    pieces: list[list[Piece | Part]]
    spans: list[str]
    auto: Sequence[AutoPart] | None = None

    def fill(self, span_parts: Sequence[Sequence[Part]]) -> list[dict[str, Any]]:
        """The messages with content parts in each span's place; neighbouring texts become one."""
        remaining = iter(span_parts)
        filled = []
        for message, pieces in zip(self.messages, self.pieces, strict=True):
            parts: list[Part] = []
            for piece in pieces if any(map(_is_new, pieces)) else []:
                if isinstance(piece, dict):
                    parts.append(piece)
                else:
                    parts += next(remaining) if piece.is_memory else [text_part(piece.text)]
            filled.append({**message, "content": _joined(parts)} if parts else message)
        return filled

    def fill_texts(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The messages with a text in each span's place; what was a string stays one."""
        filled = self.fill([[text_part(text)] for text in texts])
        return [
            {**new, "content": "".join(part["text"] for part in new["content"])}
            if new is not old and isinstance(old["content"], str)
            else new
            for old, new in zip(self.messages, filled, strict=True)
        ]

    def texts(self) -> list[str]:
        """What is outside the memory."""
        plain = (piece for pieces in self.pieces for piece in pieces if isinstance(piece, Piece))
        return [piece.text for piece in plain if not piece.is_memory]

    def query(self) -> str:
        """What the chat asks, see `chat_query`; parts that are no text are passed over."""
        texts = [
            {
                "role": message.get("role"),
                "content": "".join(
                    PLACEHOLDER if piece.is_memory else piece.text for piece in pieces if isinstance(piece, Piece)
                ),
            }
            for message, pieces in zip(self.messages, self.pieces, strict=True)
        ]
        return chat_query(texts)

    def flat(self, span_texts: Sequence[str]) -> list[dict[str, Any]]:
        """The messages with texts as contents, in which each span is what is given for it.

        Raises:
            PromptError: A role or content of another shape, or a part that a local decoder cannot read.
        """
        remaining = iter(span_texts)
        flat = []
        for number, (message, pieces) in enumerate(zip(self.messages, self.pieces, strict=True)):
            _check_role(message.get("role"), number)
            content = message.get("content")
            if not (content is None or isinstance(content, str | list)):
                kind = type(content).__name__
                raise PromptError(f"message {number}: a message's content is a text or a list of parts, got {kind}")
            _check_texts(content, number)
            texts = []
            for piece in pieces:
                if isinstance(piece, dict):
                    kind = shown(piece.get("type"))
                    raise PromptError(f"message {number}: content parts of type {kind} need a vLLM backend: send text")
                texts.append(next(remaining) if piece.is_memory else piece.text)
            flat.append({**message, "content": "".join(texts)})
        return flat


def outline_chat(messages: Any, max_spans: int | None = None) -> ChatOutline:
    """Find the memory spans of a chat; content is a string or a list of parts.

    Args:
        messages: The body's field.
        max_spans: Most spans; None for any number.

    Raises:
        PromptError: Markers that do not pair, a literal placeholder, memory in a role, messages of another shape,
            or embeddings sent by the client.
        ApiError: 413, more spans.
    """
    if not isinstance(messages, list) or not messages:
        raise PromptError("messages must be a list of at least one {'role': …, 'content': …}")
    all_pieces: list[list[Piece | Part]] = []
    spans: list[str] = []
    splitter = SpanSplitter(max_spans)
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise PromptError(f"message {number}: expected an object, got {type(message).__name__}")
        role = message.get("role")
        if isinstance(role, str) and len(splitter.split(role, f"the role of message {number}")) > 1:
            raise PromptError(f"message {number}: the role holds memory; memory belongs into the content")
        pieces = _content_pieces(message.get("content"), number, splitter)
        if memories := memories_in(pieces):
            # A message that is written anew must be understood; one that is passed on is the backend's to judge.
            check_message(message, number)
        spans += memories
        all_pieces.append(pieces)
    return ChatOutline(messages=messages, pieces=all_pieces, spans=spans)


def text_part(text: str) -> Part:
    """A content part that is a text."""
    return {"type": "text", "text": text}


def between_markers(parts: Sequence[Part]) -> list[Part]:
    """What a decoder reads as memory."""
    return [text_part(MEMORY_START), *parts, text_part(MEMORY_END)]


class SpanSplitter:
    """`split_spans` over the texts of one request, whose spans are counted before anything is made of them.

    Args:
        max_spans: Most spans of all texts; None for any number.
    """

    def __init__(self, max_spans: int | None = None) -> None:
        self._max_spans = max_spans
        self._num_spans = 0

    def split(self, text: str, where: str) -> list[Piece]:
        """Pieces of one text.

        Raises:
            PromptError: As `split_spans`.
            ApiError: 413, too many spans.
        """
        if not has_markers(text):
            return [Piece(text, False)]
        pieces = []
        for piece in split_spans(text, where):
            pieces.append(piece)
            self._num_spans += piece.is_memory
            if self._max_spans is not None and self._num_spans > self._max_spans:
                num_spans = self._num_spans + text.count(MEMORY_START) - sum(piece.is_memory for piece in pieces)
                raise ApiError(413, f"{num_spans} memory spans, the limit is {self._max_spans}")
        return pieces


def _content_pieces(content: Any, number: int, splitter: SpanSplitter) -> list[Piece | Part]:
    if isinstance(content, str):
        return [*splitter.split(content, f"message {number}")]
    pieces: list[Piece | Part] = []
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict):
            raise PromptError(f"message {number}: a content part must be an object, got {type(part).__name__}")
        if part.get("type") == EMBEDS:
            # They are pickles for the backend to open; what this gateway forwards, it has made.
            raise PromptError(f"message {number}: prompt_embeds parts are not taken from clients: send text")
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            pieces += splitter.split(part["text"], f"message {number}")
        else:
            pieces.append(part)
    return pieces


def memories_in(pieces: Sequence[Piece | Part]) -> list[str]:
    """The texts of the pieces that are memory."""
    return [piece.text for piece in pieces if isinstance(piece, Piece) and piece.is_memory]


def _is_new(piece: Piece | Part) -> bool:
    """Whether a message must be written anew for a piece: memory, or rows, which clients do not send."""
    return piece.get("type") == EMBEDS if isinstance(piece, dict) else piece.is_memory


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Content parts in which neighbouring texts are one: parts then do not depend on where spans were cut."""
    joined: list[Part] = []
    for is_text, group in itertools.groupby(parts, lambda part: part.get("type") == "text"):
        if not is_text:
            joined += group
        elif text := "".join(part["text"] for part in group):
            joined.append(text_part(text))
    return joined


def check_message(message: dict[str, Any], number: int) -> None:
    """Check what a message must have that is written anew.

    Raises:
        PromptError: A role or a text part that is no text.
    """
    _check_role(message.get("role"), number)
    _check_texts(message.get("content"), number)


def _check_role(role: Any, number: int) -> None:
    if not isinstance(role, str):
        raise PromptError(f"message {number}: the role is {shown(role)}, expected a text")


def _check_texts(content: Any, number: int) -> None:
    for place, part in enumerate(content if isinstance(content, list) else []):
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise PromptError(
                f"message {number}, part {place}: the field text is {shown(part.get('text'))}, expected a text"
            )
