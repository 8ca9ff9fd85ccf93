"""The JSON of an answer of the decoder in this process, whole or in pieces, in the chat's or the completion's shape."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.client.completion import Completion
from utils.serving.local_request import LocalRequest

if TYPE_CHECKING:
    from utils.inference.answer_watch import AnswerPiece
    from utils.inference.token_scores import ScoredToken, TokenLogprob

Json = dict[str, Any]


class AnswerShape:
    """Writes one answer.

    Args:
        wanted: What was asked.
        model: The model's name.
        prompt_tokens: Rows of the prompt.
        cached_rows: Those that are latents from the cache.
    """

    def __init__(self, wanted: LocalRequest, model: str, prompt_tokens: int, cached_rows: int = 0) -> None:
        self._wanted = wanted
        self._prompt_tokens = prompt_tokens
        self._cached_rows = cached_rows
        kind = "chat.completion" if wanted.chat else "text_completion"
        prefix = "chatcmpl" if wanted.chat else "cmpl"
        self._object = kind + (".chunk" if wanted.chat and wanted.stream else "")
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[AnswerPiece], answers: Sequence[Completion]) -> Json:
        """An answer that is not streamed.

        Args:
            pieces: Of all choices, each one's in order.
            answers: One a choice.
        """
        choices = []
        for number, answer in enumerate(answers):
            own = [piece for piece in pieces if piece.number == number]
            text = "".join(piece.text for piece in own)
            said: Json = {"message": {"role": "assistant", "content": text}} if self._wanted.chat else {"text": text}
            tokens = [token for piece in own for token in piece.tokens]
            choices.append(self._choice(number, said, answer.finish_reason, tokens))
        return self._body(choices, usage=self._usage(answers))

    def beginning(self, number: int) -> Json:
        """The first piece of a choice."""
        said: Json = {"delta": {"role": "assistant", "content": ""}} if self._wanted.chat else {"text": ""}
        return self._body([self._choice(number, said)])

    def piece(self, piece: AnswerPiece) -> Json:
        """One piece of a stream."""
        said: Json = {"delta": {"content": piece.text}} if self._wanted.chat else {"text": piece.text}
        return self._body([self._choice(piece.number, said, tokens=piece.tokens)])

    def ending(self, answers: Sequence[Completion]) -> list[Json]:
        """The last pieces: why each choice ended, and the usage where it was asked for."""
        said: Json = {"delta": {}} if self._wanted.chat else {"text": ""}
        last = [self._body([self._choice(number, said, answer.finish_reason)]) for number, answer in enumerate(answers)]
        return [*last, self._body([], usage=self._usage(answers))] if self._wanted.include_usage else last

    def _choice(
        self, number: int, said: Json, finish_reason: str | None = None, tokens: Sequence[ScoredToken] = ()
    ) -> Json:
        logprobs = None
        if self._wanted.logprobs is not None:
            logprobs = _chat_logprobs(tokens) if self._wanted.chat else _completion_logprobs(tokens)
        return {"index": number, "finish_reason": finish_reason, "logprobs": logprobs, **said}

    def _body(self, choices: list[Json], **more: Any) -> Json:
        return {**self._common, "object": self._object, "choices": choices, **more}

    def _usage(self, answers: Sequence[Completion]) -> Json:
        new = sum(answer.completion_tokens or 0 for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self._cached_rows},
        }


def _chat_logprobs(tokens: Sequence[ScoredToken]) -> Json:
    content = [
        {**_token(token.token), "top_logprobs": [_token(likely) for likely in token.likeliest]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}


def _completion_logprobs(tokens: Sequence[ScoredToken]) -> Json:
    return {
        "tokens": [token.token.text for token in tokens],
        "token_logprobs": [token.token.logprob for token in tokens],
        # With the token that was drawn, be it likely or not.
        "top_logprobs": [
            {likely.text: likely.logprob for likely in (*token.likeliest, token.token)} for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
