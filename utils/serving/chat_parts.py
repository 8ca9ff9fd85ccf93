"""Chat messages with memory markers → messages whose content parts hold latents; pure functions on JSON.

    outline = outline_chat(messages)       # outline.spans: the texts between the markers
    outline.fill([part, …])                # one content part a span: latents between the markers, or plain text

A message without memory stays as it was, strings included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import PromptError
from utils.model.markers import MEMORY_END, MEMORY_START
from utils.model.prompt import Piece, split_spans

Part = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOutline:
    """Messages in which the memory spans are still to be filled in.

    Attributes:
        messages: As they came.
        pieces: For each message, its content as pieces and foreign parts in order; None where there is no memory.
        spans: The spans' texts in order.
    """

    messages: list[dict[str, Any]]
    pieces: list[list[Piece | Part] | None]
    spans: list[str]

    def fill(self, span_parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The messages with one content part for each span; latents come to stand between the markers."""
        remaining = iter(span_parts)
        filled = []
        for message, pieces in zip(self.messages, self.pieces, strict=True):
            if pieces is None:
                filled.append(message)
                continue
            content: list[Part] = []
            for piece in pieces:
                if isinstance(piece, dict):
                    content.append(piece)
                elif not piece.is_memory:
                    _append_text(content, piece.text)
                else:
                    part = next(remaining)
                    is_latents = part["type"] != "text"
                    _append_text(content, MEMORY_START if is_latents else part["text"])
                    if is_latents:
                        content.append(part)
                        _append_text(content, MEMORY_END)
            filled.append({**message, "content": content})
        return filled


def outline_chat(messages: Any) -> ChatOutline:
    """Find the memory spans of a chat; content is a string or a list of parts.

    Raises:
        PromptError: Markers that do not pair, a literal placeholder, memory in a role, messages of another shape,
            or embeddings sent by the client.
    """
    if not isinstance(messages, list) or not messages:
        raise PromptError("messages must be a list of at least one {'role': …, 'content': …}")
    all_pieces: list[list[Piece | Part] | None] = []
    spans: list[str] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise PromptError(f"message {number}: expected an object, got {type(message).__name__}")
        if any(piece.is_memory for piece in split_spans(str(message.get("role")), f"the role of message {number}")):
            raise PromptError(f"message {number}: the role holds memory; memory belongs into the content")
        pieces = _content_pieces(message.get("content"), number)
        memories = [piece.text for piece in pieces if isinstance(piece, Piece) and piece.is_memory]
        spans += memories
        all_pieces.append(pieces if memories else None)
    return ChatOutline(messages=messages, pieces=all_pieces, spans=spans)


def _content_pieces(content: Any, number: int) -> list[Piece | Part]:
    if isinstance(content, str):
        return [*split_spans(content, f"message {number}")]
    pieces: list[Piece | Part] = []
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict):
            raise PromptError(f"message {number}: a content part must be an object, got {type(part).__name__}")
        if part.get("type") == "prompt_embeds":
            # They are pickles for the backend to open; what this gateway forwards, it has made.
            raise PromptError(f"message {number}: prompt_embeds parts are not taken from clients: send text")
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            pieces += split_spans(part["text"], f"message {number}")
        else:
            pieces.append(part)
    return pieces


def _append_text(content: list[Part], text: str) -> None:
    """Add text to the part before where that is text, too: parts then do not depend on where spans were cut."""
    if not text:
        return
    if content and content[-1].keys() == {"type", "text"}:
        content[-1] = {"type": "text", "text": content[-1]["text"] + text}
    else:
        content.append({"type": "text", "text": text})
