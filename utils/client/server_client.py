"""The client of a vLLM server that takes prompt embeddings; any OpenAI-compatible server answers its text prompts.

    async with VllmClient("http://127.0.0.1:8000") as client:
        await client.preflight(width=embeds.values_TD.shape[1])
        answer = await client.complete(embeds.values_TD, max_tokens=64, temperature=0)

`complete` sends a whole prompt and no template is applied. `chat` sends messages whose content parts may be latents
(`embeds_part`) and the server applies its template around them. With `on_text` the answer streams; the returned
`Completion` is the same either way. Shape legend: T prompt rows, D decoder width.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
import orjson
import tenacity
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from utils.client.answer import AnswerReader
from utils.client.completion import Completion, RetryPolicy
from utils.client.connection import RequestError, api_base, find_api_key, request_errors
from utils.errors import ConfigError, ServerError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OnText = Callable[[str], None]
ENABLE_FLAG = "--enable-prompt-embeds"
_FEW_TRIES = RetryPolicy(attempts=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that the server offers.

    Attributes:
        name: What requests call it.
        max_model_len: Longest prompt with answer, in tokens; None if the server does not say.
    """

    name: str
    max_model_len: int | None


class VllmClient:
    """Asks one server; several requests may run at once.

    Args:
        server_url: Address, with or without `/v1`.
        model: Served name; None for the server's only one.
        api_key: Key; None looks into the environment.
        timeout_s: Longest time until a whole answer, or until a streamed one begins; then the longest silence.
        retry: When to ask again. A streamed answer that has begun is not asked for again.
        dtype: The server's dtype, for rows on the wire; None sends them as they are.

    Raises:
        ConfigError: The address is unusable.
    """

    def __init__(
        self,
        server_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy = _FEW_TRIES,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.base_url = api_base(server_url)
        self.model = model
        self._timeout_s = timeout_s
        self._retry = retry
        self._dtype = dtype
        self._joins_parts: bool | None = None
        # Its own retries repeat time-outs, and cannot repeat an answer that is no completion.
        self._openai = openai.AsyncOpenAI(
            base_url=self.base_url, api_key=find_api_key(api_key), timeout=timeout_s, max_retries=0
        )

    async def __aenter__(self) -> VllmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    def embeds_part(self, values_TD: torch.Tensor) -> dict[str, str]:
        """A content part of a chat message that holds rows [T, D].

        Raises:
            DatasetError: The rows are not a finite float matrix.
        """
        return {"type": "prompt_embeds", "data": self._wire(values_TD)}

    async def models(self) -> list[ServedModel]:
        """What the server offers.

        Raises:
            RequestError: It does not say.
        """

        async def list_once() -> Any:
            async with self._in_time(self.base_url):
                return await self._openai.models.list()

        listing: Any = await self._retrying(lambda error: not error.unreachable)(list_once)
        offered = getattr(listing, "data", None) or []
        return [
            ServedModel(name=model.id, max_model_len=getattr(model, "max_model_len", None))
            for model in offered
            # A gateway's variants of a model that it lists as well.
            if not hasattr(model, "code_llava")
        ]

    async def preflight(self, width: int | None = None) -> ServedModel:
        """Find out whether the server can answer, before anything large is sent, and fix the model's name.

        Args:
            width: Columns of the rows that will be sent; None for text only.

        Raises:
            ServerError: Not running, no such model (the message lists the served ones), prompt embeddings not
                enabled, or another width.
            ConfigError: Several models and none named.
        """
        try:
            served = await self.models()
        except RequestError as error:
            if error.status is not None:
                raise
            raise ServerError(
                f"no server at {self.base_url} ({error}): start one with `vllm serve MODEL {ENABLE_FLAG}`, "
                "or name another address with --server-url"
            ) from None
        names = ", ".join(model.name for model in served) or "no model"
        if self.model is None and len(served) != 1:
            raise ConfigError(f"{self.base_url} serves {names}: name one with --model")
        chosen = next((model for model in served if self.model in (None, model.name)), None)
        if chosen is None:
            raise ServerError(f"{self.base_url} has no model {self.model!r}, it serves {names}: correct --model")
        self.model = chosen.name
        if width is not None:
            await self._check_embeds(width)
        return chosen

    async def complete(self, prompt: str | torch.Tensor, *, on_text: OnText | None = None, **fields: Any) -> Completion:
        """Continue a prompt, exactly as given: no template is applied.

        Args:
            prompt: Text, or rows [T, D].
            on_text: Called with each piece of text as it arrives.
            **fields: Further request fields: max_tokens, temperature, top_p, seed, stop, top_k, ….

        Raises:
            RequestError: The server refused or failed; the message is its own.
            DatasetError: The rows are not a finite float matrix.
        """
        if isinstance(prompt, str):
            return await self._ask("/completions", {**fields, "prompt": prompt}, on_text)
        # Servers refuse an empty `prompt` beside embeddings: it is left out.
        return await self._ask("/completions", {**fields, "prompt_embeds": self._wire(prompt)}, on_text)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, on_text: OnText | None = None, **fields: Any
    ) -> Completion:
        """Answer messages; the server applies its chat template.

        Where the server's template takes plain strings, the server itself joins a message's parts with newlines. A
        message that mixes latents with other parts then reads differently from the same prompt compressed locally:
        this is looked for once and logged as a warning. `complete` with a whole prompt is always exact.

        Args:
            messages: `{"role", "content"}`; content is a string or a list of parts, see `embeds_part`.
            on_text: Called with each piece of text as it arrives.
            **fields: Further request fields.

        Raises:
            RequestError: The server refused or failed; the message is its own.
        """
        if any(_mixes_parts(message.get("content")) for message in messages):
            await self._warn_if_parts_are_joined()
        return await self._ask("/chat/completions", {**fields, "messages": list(messages)}, on_text)

    async def joins_parts(self) -> bool | None:
        """Whether the server puts newlines between the parts of a message; None where it has no `/tokenize`."""
        if self._joins_parts is None:
            parts = [{"type": "text", "text": text} for text in ("left", "right")]
            try:
                apart, together = [await self._tokenize(content) for content in (parts, "leftright")]
            except RequestError as error:
                logger.debug("cannot tell how the server joins content parts: %s", error)
                return None
            self._joins_parts = apart != together
        return self._joins_parts

    async def _warn_if_parts_are_joined(self) -> None:
        known = self._joins_parts
        if await self.joins_parts() and known is None:
            logger.warning(
                "%s joins the parts of a message with newlines (its chat template takes plain strings), so this "
                "prompt has more tokens than the local one: use the completions API for exact answers",
                self.base_url,
            )

    async def _tokenize(self, content: Any) -> Any:
        url = self.base_url.removesuffix("/v1") + "/tokenize"
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        async with self._in_time(url):
            reply = await self._openai.post(url, cast_to=object, body=body)
        return reply.get("tokens") if isinstance(reply, dict) else None

    async def _check_embeds(self, width: int) -> None:
        """Send one row of zeros: a server that will refuse the real rows refuses it for the same reason."""
        import torch

        row = self._wire(torch.zeros(1, width))
        probe = self._body({"prompt_embeds": row, "max_tokens": 1, "temperature": 0}, stream=False)
        try:
            await self._ask_once("/completions", probe, None)
        except RequestError as error:
            message = str(error)
            if ENABLE_FLAG in message:
                raise ServerError(
                    f"the server takes no prompt embeddings: restart it with {ENABLE_FLAG} ({message})"
                ) from None
            if "hidden_size" in message:
                raise ServerError(
                    f"the rows are {width} wide, but not the served model {self.model}: compress with the checkpoint "
                    f"whose decoder is served ({message})"
                ) from None
            raise

    def _wire(self, values_TD: torch.Tensor) -> str:
        from utils.compress.prompt_embeds import encode_wire  # late: text prompts need no torch

        return encode_wire(values_TD, self._dtype)

    def _retrying(self, may_cure: Callable[[RequestError], bool]) -> tenacity.AsyncRetrying:
        """Calls a function until it is through, out of tries, or fails in a way that another try does not cure."""
        policy = self._retry
        back_off = tenacity.wait_random_exponential(policy.first_wait_s, policy.longest_wait_s)

        def wait_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked_s = getattr(error, "retry_after_s", None) or 0.0
            return min(max(back_off(state), asked_s), policy.longest_wait_s)

        def again(error: BaseException) -> bool:
            if not isinstance(error, RequestError) or not may_cure(error):
                return False
            return error.transient or (policy.unanswered and error.status is None)

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(policy.attempts),
            wait=wait_s,
            retry=tenacity.retry_if_exception(again),
            before_sleep=tenacity.before_sleep_log(logger, logging.INFO),
            reraise=True,
        )

    def _body(self, fields: Mapping[str, Any], stream: bool) -> bytes:
        """A request's JSON; orjson, because blobs are megabytes."""
        body = {"model": self.model, **{name: value for name, value in fields.items() if value is not None}}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return orjson.dumps(body)

    async def _ask(self, path: str, fields: Mapping[str, Any], on_text: OnText | None) -> Completion:
        if self.model is None:
            await self.preflight()
        content = self._body(fields, stream=on_text is not None)
        begun = False

        def note_text(text: str) -> None:
            nonlocal begun
            begun = True
            if on_text is not None:
                on_text(text)

        ask = self._retrying(lambda error: not begun)
        return await ask(self._ask_once, path, content, note_text if on_text else None)

    @contextlib.asynccontextmanager
    async def _in_time(self, where: str) -> AsyncIterator[None]:
        """Bound the whole time of a request; its errors as `request_errors` tells them.

        The package's own limit begins anew with each byte: a server that drips would hold us for ever.
        """
        with request_errors(where, self._timeout_s):
            async with asyncio.timeout(self._timeout_s):
                yield

    async def _ask_once(self, path: str, content: bytes, on_text: OnText | None) -> Completion:
        where = self.base_url + path
        chat = path.startswith("/chat")
        options: Any = {"headers": {"Content-Type": "application/json"}}
        reader = AnswerReader(where)
        if on_text is None:
            whole: Any = ChatCompletion if chat else TextCompletion
            async with self._in_time(where):
                reader.read(await self._openai.post(path, cast_to=whole, content=content, options=options))
            return reader.completion(streamed=False)
        piece: Any = ChatCompletionChunk if chat else TextCompletion
        kind = openai.AsyncStream[piece]
        async with self._in_time(where):
            stream: openai.AsyncStream[Any] = await self._openai.post(
                path, cast_to=piece, content=content, options=options, stream=True, stream_cls=kind
            )
        with request_errors(where, self._timeout_s):
            async with stream:
                async for reply in stream:
                    if text := reader.read(reply):
                        on_text(text)
        return reader.completion(streamed=True)


def _mixes_parts(content: Any) -> bool:
    """Whether a message has latents beside other parts."""
    if not isinstance(content, list) or len(content) < 2:
        return False
    return any(isinstance(part, Mapping) and part.get("type") == "prompt_embeds" for part in content)
