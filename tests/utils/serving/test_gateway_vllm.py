"""The gateway in front of a real vLLM server: its answers are the local decoder's, also with many clients at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.vllm_server import local_answer
from utils.inference.compressor import Compressor
from utils.model.markers import MEMORY_END, MEMORY_START

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def gateway(compressor: Compressor, vllm_url: str) -> Iterator[str]:
    from tests.support import gateway_server

    with gateway_server.running(compressor, vllm_url) as url:
        yield url


def code(number: int) -> str:
    return f"def secret_{number}():\n    return {number * 7919}\n"


def prompt_text(count: int, first: int = 0) -> str:
    spans = " ".join(f"{MEMORY_START}{code(first + n)}{MEMORY_END}" for n in range(count))
    return f"Prompt {first}: what is this? {spans} One word."


@pytest.mark.parametrize("count", [1, 2, 20])
def test_answers_are_the_local_decoders(gateway: str, compressor: Compressor, decoder: Any, count: int) -> None:
    text = prompt_text(count, first=1000 * count)
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": NEW_TOKENS, "temperature": 0}
    messages: Any = [{"role": "user", "content": text}]
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="x") as client:
        chat = client.chat.completions.create(messages=messages, **fields)
        pieces = client.chat.completions.create(messages=messages, stream=True, **fields)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        completion = client.completions.create(prompt=text, **fields)
    of_chat = local_answer(decoder, compressor, compressor.parse_chat(messages), NEW_TOKENS)
    assert chat.choices[0].message.content == streamed == of_chat
    assert completion.choices[0].text == local_answer(decoder, compressor, compressor.parse_raw(text), NEW_TOKENS)


def test_a_second_request_costs_no_encoding_and_hits_the_backends_prefix_cache(gateway: str) -> None:
    long = f"{MEMORY_START}{''.join(code(n) for n in range(120))}{MEMORY_END} What is this?"
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": long}]}
    first, second = (httpx.post(f"{gateway}/v1/chat/completions", json=body, timeout=300).json() for _ in range(2))
    assert first["code_llava"]["cached_tokens"] == 0
    assert second["code_llava"]["cached_tokens"] == second["code_llava"]["memory_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128


def test_many_clients_get_their_own_answers(gateway: str, compressor: Compressor, decoder: Any) -> None:
    numbers = range(40)

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway}/v1", api_key="x", max_retries=0, timeout=500) as client:

            async def ask(number: int) -> str:
                messages: Any = [{"role": "user", "content": prompt_text(1, first=number)}]
                got = await client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=NEW_TOKENS, temperature=0
                )
                return got.choices[0].message.content or ""

            return list(await asyncio.gather(*(ask(number) for number in numbers)))

    answers = asyncio.run(ask_all())
    assert len(set(answers)) > 1
    for number in numbers:
        messages = [{"role": "user", "content": prompt_text(1, first=number)}]
        assert answers[number] == local_answer(decoder, compressor, compressor.parse_chat(messages), NEW_TOKENS), number
