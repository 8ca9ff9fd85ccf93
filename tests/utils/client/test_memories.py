"""The client of stored memories against a gateway with the decoder in its process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import local_gateway
from tests.support.processes import free_port
from tests.support.prompts import CHAT, chat_body
from utils.checkpoint.settings import ON_CPU
from utils.client.memories import MemoryClient
from utils.compress.compressor import Compressor
from utils.errors import PromptError, ServerError
from utils.model.markers import wrap

LINES = [f"setting_{number} = {number * 7919}\n" for number in range(40)]
TEXT = "".join(LINES)


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path]) -> Iterator[str]:
    with local_gateway.running(Compressor.load(checkpoints["lclm"], settings=ON_CPU), api_keys=("key",)) as address:
        yield address


def use(url: str, act: Callable[[MemoryClient], Awaitable[Any]], **arguments: Any) -> Any:
    async def run() -> Any:
        async with MemoryClient(url, **{"api_key": "key", **arguments}) as client:
            return await act(client)

    return asyncio.run(run())


def test_a_memory_is_stored_asked_about_read_and_forgotten(url: str) -> None:
    async def act(client: MemoryClient) -> None:
        stored = await client.store(TEXT)
        name = stored["id"]
        assert (stored["bytes"], [memory["id"] for memory in await client.list()]) == (len(TEXT), [name])
        answer = await client.ask("What is setting_17?", [name, name], 3, temperature=0)
        assert answer["code_llava"]["memory_tokens"] == 2 * len(TEXT)
        text = await client.expand("What is setting_17?", [name], 60)
        assert LINES[17] in text
        assert LINES[3] not in text
        # What is stored is kept once.
        assert [memory["id"] for memory in await client.list()] == [name]
        assert await client.whole(name) == TEXT
        await client.delete(name)
        with pytest.raises(ServerError, match=f"404, no memory '{name}'"):
            await client.delete(name)

    use(url, act)


def test_an_answer_is_that_of_a_chat_with_markers(url: str) -> None:
    async def act(client: MemoryClient) -> Any:
        name = (await client.store(TEXT))["id"]
        return await client.ask("Why?", [name], 4, temperature=0)

    said = use(url, act)["choices"][0]["message"]["content"]
    body = chat_body(f"{wrap(TEXT)}\nWhy?", max_tokens=4, temperature=0)
    chat = httpx.post(url + CHAT, json=body, headers={"Authorization": "Bearer key"}).json()
    assert said == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda client: client.ask(f"a {wrap('b')}", ["mem-1"]), "memory marker"),
        (lambda client: client.ask("a", []), "no memory is named"),
        (lambda client: client.whole("../models"), "is no memory's id"),
        (lambda client: client.expand("a", [f"1{wrap('b')}"]), "is no memory's id"),
    ],
)
def test_what_is_no_question_and_no_id_is_not_sent(url: str, act: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        use(url, act)


def test_failures_say_what_the_gateway_said(url: str) -> None:
    with pytest.raises(ServerError, match=r"GET http.*/v1/memories: 401, wrong or missing API key"):
        use(url, lambda client: client.list(), api_key="other")
    with pytest.raises(ServerError, match="404, no memory"):
        use(url, lambda client: client.ask("a", ["mem-" + "0" * 32]))
    with pytest.raises(ServerError, match="is it running"):
        use(f"http://127.0.0.1:{free_port()}", lambda client: client.list())
