"""What a server answered, put together from one whole reply or from the pieces of a stream; its shape is distrusted."""

from __future__ import annotations

import time
from typing import Any

from utils.client.completion import Completion
from utils.client.connection import RequestError


class AnswerReader:
    """Collects the replies to one request.

    Args:
        where: The address, for error messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._started = time.perf_counter()
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._usage: Any = None
        self._first_text_s: float | None = None

    def read(self, reply: Any) -> str:
        """Take in a reply or a piece of one; returns its text.

        Raises:
            RequestError: It is no completion.
        """
        choices = getattr(reply, "choices", None)
        if not isinstance(choices, list):
            raise RequestError(f"{self._where} sent what is no completion: {str(reply)[:300]}")
        self._usage = getattr(reply, "usage", None) or self._usage
        if not choices:  # the last piece of a stream holds the usage alone
            return ""
        choice = choices[0]
        holder = getattr(choice, "delta", None) or getattr(choice, "message", None)
        text = getattr(choice, "text", None) if holder is None else getattr(holder, "content", None)
        self._finish_reason = getattr(choice, "finish_reason", None) or self._finish_reason
        if not text:
            return ""
        if self._first_text_s is None:
            self._first_text_s = time.perf_counter() - self._started
        self._texts.append(text)
        return str(text)

    def completion(self, streamed: bool) -> Completion:
        """The whole answer.

        Raises:
            RequestError: The stream ended before the answer did.
        """
        text = "".join(self._texts)
        if self._finish_reason is None:
            raise RequestError(f"{self._where} broke the answer off after {len(text)} characters", transient=True)
        details = getattr(self._usage, "prompt_tokens_details", None)
        return Completion(
            text=text,
            finish_reason=self._finish_reason,
            prompt_tokens=getattr(self._usage, "prompt_tokens", None),
            completion_tokens=getattr(self._usage, "completion_tokens", None),
            cached_tokens=getattr(details, "cached_tokens", None),
            first_text_s=self._first_text_s if streamed else None,
            total_s=time.perf_counter() - self._started,
        )
