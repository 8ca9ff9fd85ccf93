"""Memory without markers: long parts of a chat that nobody marked become spans.

    outline = mark_long_parts(outline_chat(messages), least_tokens=500)
    outline.auto        # for each part: memory, or why it stays text

Tool results, documents in system messages and old turns are what fills long chats. What is asked now stays text: the
last user message, and a message that the model is to continue. So does what is short. A chat with markers is taken as
marked.
"""

from __future__ import annotations

from dataclasses import replace

from utils.model.markers import Piece
from utils.serving.api_error import ApiError
from utils.serving.chat_parts import AutoPart, ChatOutline, Part, check_message, memories_in

# Nothing is tokenised before it is known to fit; of code and English a token has about as many.
CHARACTERS_PER_TOKEN = 4


def mark_long_parts(outline: ChatOutline, least_tokens: int, max_spans: int) -> ChatOutline:
    """The outline with its long parts as spans; the same where it has spans of its own.

    Args:
        outline: Of a chat.
        least_tokens: Shorter parts stay text, at `CHARACTERS_PER_TOKEN`.
        max_spans: Most spans.

    Raises:
        PromptError: A message of another shape.
        ApiError: 413, more spans.
    """
    if outline.spans:
        return outline
    roles = [message.get("role") for message in outline.messages]
    asked = max((number for number, role in enumerate(roles) if role == "user"), default=None)
    parts: list[AutoPart] = []
    all_pieces: list[list[Piece | Part]] = []
    for number, (message, pieces) in enumerate(zip(outline.messages, outline.pieces, strict=True)):
        reason = None
        if number == asked:
            reason = "the last user message"
        elif number == len(roles) - 1 and roles[number] == "assistant":
            reason = "the model continues it"
        marked: list[Piece | Part] = []
        for piece in pieces:
            if isinstance(piece, Piece) and piece.text:
                own = reason or _too_short(piece.text, least_tokens)
                if own is None:
                    check_message(message, number)
                parts.append(AutoPart(message=number, characters=len(piece.text), reason=own))
                piece = Piece(piece.text, own is None)
            marked.append(piece)
        all_pieces.append(marked)
    spans = [text for pieces in all_pieces for text in memories_in(pieces)]
    if len(spans) > max_spans:
        raise ApiError(413, f"{len(spans)} long parts would become memory spans, the limit is {max_spans}")
    return replace(outline, pieces=all_pieces, spans=spans, auto=parts)


def _too_short(text: str, least_tokens: int) -> str | None:
    least = CHARACTERS_PER_TOKEN * least_tokens
    return f"shorter than {least} characters" if len(text) < least else None
