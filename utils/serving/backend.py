"""What stands behind the gateway, a server or the decoder in this process, behind one small interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from utils.serving.rewriter import CompressedRequest

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a backend answers.

    Attributes:
        content: A whole body, or a stream's pieces. Leaving the stream early ends the backend's work.
        status: HTTP status.
        media_type: Of the content.
        headers: Further headers that the client gets.
    """

    content: bytes | AsyncIterator[bytes]
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """Answers requests; cancelling one ends its work.

    Attributes:
        is_local: It reads prompts that were parsed whole; a server gets a body, and judges the text in it by itself.
    """

    is_local: bool

    async def models(self) -> Answer:
        """The list of models, as the API shows it.

        Raises:
            ApiError: There is no answer.
        """
        ...

    async def ask(self, request: CompressedRequest) -> Answer:
        """Answer a chat or a completion.

        Raises:
            ApiError: There is no answer.
        """
        ...

    async def close(self) -> None:
        """End what runs, and let go of connections and threads."""
        ...
