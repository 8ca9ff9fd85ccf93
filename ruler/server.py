"""The `server-text` backend: prompts as text to an OpenAI-compatible server.

The runner owns the retries; this module sorts what a server does into three kinds: worth another try, this row cannot
be answered, nothing can.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from ruler.protocol import Answer, BackendSettings, Question, RowRefusedError, TransientError
from utils.errors import ConfigError, ServerError

logger = logging.getLogger(__name__)

_REFUSED_STATUS = (400, 413, 422)
_TRANSIENT_STATUS = (408, 409, 425, 429)


class ServerText:
    """Sends prompts as text to `/v1/completions` or `/v1/chat/completions`."""

    batch_size = 1

    def __init__(self, settings: BackendSettings) -> None:
        import openai

        self.concurrency = settings.concurrency
        self.details: dict[str, Any] = {}
        self._settings = settings
        # The runner owns the retries: a second layer inside the client would multiply them.
        self._client = openai.AsyncOpenAI(
            base_url=settings.server_url.rstrip("/").removesuffix("/v1") + "/v1",
            api_key=settings.api_key or os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY",
            timeout=settings.timeout_s,
            max_retries=0,
        )
        self._model = settings.model or ""

    async def start(self) -> None:
        """Choose the server's only model where none is named; a server that is not there is an error at once."""
        try:
            listing = await self._call(self._client.models.list)
        except TransientError as error:
            if error.unreachable:
                raise ServerError(f"{error}: start the server, or name another address with --server-url") from None
            if not self._model:
                raise
            logger.info("%s (going on with model %s)", error, self._model)
        else:
            names = [model.id for model in getattr(listing, "data", None) or []]
            if not self._model:
                if len(names) != 1:
                    raise ConfigError(f"{self._client.base_url} serves {names or 'no model'}: name one with --model")
                self._model = names[0]
        self.details["model"] = self._model

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask each question with its own request."""
        return [await self._ask(question) for question in questions]

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _ask(self, question: Question) -> Answer:
        arguments = self._arguments(question)
        if self._settings.api == "chat":
            messages = self._settings.messages(question.text)
            reply = await self._call(self._client.chat.completions.create, messages=messages, **arguments)
            return read_reply(reply, lambda choice: choice.message.content or "")
        reply = await self._call(self._client.completions.create, prompt=question.text, **arguments)
        return read_reply(reply, lambda choice: choice.text)

    def _arguments(self, question: Question) -> dict[str, Any]:
        """What every kind of request has."""
        sampling = self._settings.sampling
        return {
            "model": self._model,
            "max_tokens": question.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
            # Not OpenAI's, but vLLM's and SGLang's; left out at "no limit" so that OpenAI accepts the request.
            "extra_body": {"top_k": sampling.top_k} if sampling.top_k > 0 else None,
        }

    async def _call(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """Call the server and sort its failures into the three kinds."""
        import openai

        where = str(self._client.base_url)
        try:
            return await method(**arguments)
        except openai.APIStatusError as error:
            message = f"{where}: HTTP {error.status_code}: {_short(error.response.text)}"
            if error.status_code in _REFUSED_STATUS:
                raise RowRefusedError(message) from None
            if error.status_code in _TRANSIENT_STATUS or error.status_code >= 500:
                raise TransientError(
                    message, retry_after_s=_seconds(error.response.headers.get("retry-after"))
                ) from None
            raise ServerError(message) from None
        except openai.APITimeoutError:
            raise TransientError(f"{where}: no answer within {self._settings.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            # By name: the client's transport is httpx in some releases of openai and httpx2 in others.
            unreachable = type(cause).__name__ == "ConnectError"
            raise TransientError(f"{where}: connection failed: {cause}", unreachable=unreachable) from None
        except (openai.APIError, ValueError) as error:
            # A body that is no JSON, or JSON of another shape.
            raise TransientError(f"{where}: the answer is not a completion: {_short(str(error))}") from None


def read_reply(reply: Any, text_of: Callable[[Any], Any]) -> Answer:
    """Take text and token count out of a reply, distrusting its shape."""
    try:
        text = text_of(reply.choices[0])
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise TransientError(f"the server's answer is not a completion: {_short(str(reply))}")
    tokens = getattr(getattr(reply, "usage", None), "prompt_tokens", None)
    return Answer(text=text, prompt_tokens=tokens if isinstance(tokens, int) else None)


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _seconds(retry_after: str | None) -> float | None:
    """The delay form of Retry-After; its date form is left to the back-off."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
