"""A gateway's stored memories from a program: store texts, ask about them, read what a question needs of them.

    async with MemoryClient("http://127.0.0.1:8080") as client:
        memory = await client.store("def area(w, h): return w * h")
        answer = await client.ask("What does area return?", [memory["id"]])

Needs httpx alone; no torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from utils.client.connection import api_base
from utils.errors import PromptError, ServerError
from utils.model.markers import has_markers, wrap

Json = dict[str, Any]


class MemoryClient:
    """Talks to one gateway (`python -m utils.serving.gateway`).

    Args:
        gateway_url: Its address, with or without `/v1`.
        api_key: One of its keys; None where it has none.
        model: Which model answers; None for the gateway's first.
        timeout_s: Longest silence of the gateway.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(
        self,
        gateway_url: str,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._model = model
        self._http = httpx.AsyncClient(
            base_url=api_base(gateway_url),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=timeout_s,
        )

    async def __aenter__(self) -> MemoryClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def store(self, text: str) -> Json:
        """Store a text; returns its `id`, `bytes`, `created` and `expires`.

        Raises:
            ServerError: Here and in all other methods: the gateway cannot be reached, or refuses; the message says why.
        """
        return await self._call("POST", "/memories", {"text": text})

    async def list(self) -> Sequence[Json]:
        """The key's own memories, the least recently used first."""
        return (await self._call("GET", "/memories"))["data"]

    async def ask(self, question: str, memory_ids: Sequence[str], max_tokens: int | None = None, **fields: Any) -> Json:
        """Ask about memories, which the model reads compressed.

        Args:
            question: The question.
            memory_ids: Of the memories, in the order in which they are read.
            max_tokens: Most tokens of the answer; None for what the model has room for.
            fields: Further ones of the request, such as `temperature` or `code_llava`.

        Returns:
            The whole answer of the API, with the report under `code_llava`.

        Raises:
            PromptError: The question holds a memory marker.
        """
        body = {"model": await self._model_name(), "messages": [_user(_references(memory_ids) + _plain(question))]}
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}
        return await self._call("POST", "/chat/completions", {**body, **limit, **fields})

    async def expand(self, question: str, memory_ids: Sequence[str], num_tokens: int = 1024) -> str:
        """The exact text of memories that a question needs; what is left out is named in its place.

        Args:
            question: What to select by.
            memory_ids: Of the memories.
            num_tokens: Most tokens of text, notes not counted.

        Raises:
            PromptError: The question holds a memory marker.
        """
        # Apart from the question, so that what comes back in its place is the memory alone.
        messages = [{"role": "system", "content": _references(memory_ids)}, _user(_plain(question))]
        options = {"auto": False, "expand_tokens": num_tokens}
        answer = await self._call("POST", "/compress", {"messages": messages, "as": "text", "code_llava": options})
        return answer["messages"][0]["content"]

    async def whole(self, memory_id: str) -> str:
        """A memory's whole text."""
        return (await self._call("GET", f"/retrieve/{_path(memory_id)}"))["original_content"]

    async def delete(self, memory_id: str) -> None:
        """Forget a memory."""
        await self._call("DELETE", f"/memories/{_path(memory_id)}")

    async def _model_name(self) -> str:
        if self._model is None:
            self._model = (await self._call("GET", "/models"))["data"][0]["id"]
        return str(self._model)

    async def _call(self, method: str, path: str, body: Json | None = None) -> Json:
        where = f"{method} {str(self._http.base_url).rstrip('/')}{path}"
        try:
            answer = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{where}: {error or type(error).__name__}; is it running?") from None
        try:
            value = answer.json()
            refused = None if answer.status_code < 400 else value["error"]["message"]
        except (ValueError, LookupError, TypeError):
            refused = "no answer of a gateway"
        if refused is not None:
            raise ServerError(f"{where}: {answer.status_code}, {refused}")
        return value


def _user(content: str) -> Json:
    return {"role": "user", "content": content}


def _references(memory_ids: Sequence[str]) -> str:
    if not memory_ids:
        raise PromptError("no memory is named: expected one id or more")
    return "".join(f"{wrap('@' + _path(memory_id))}\n" for memory_id in memory_ids)


def _path(memory_id: str) -> str:
    if not memory_id.isascii() or not memory_id.replace("-", "").isalnum():
        raise PromptError(f"{memory_id[:60]!r} is no memory's id, expected what storing it told")
    return memory_id


def _plain(question: str) -> str:
    if has_markers(question):
        raise PromptError("the question holds a memory marker: store what it should hold, and name its id")
    return question
