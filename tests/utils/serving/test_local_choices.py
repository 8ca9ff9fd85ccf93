"""The local backend's choices, log-probabilities, penalties and cached tokens, in OpenAI's shapes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import local_gateway, prompts
from tests.support.prompts import CHAT, CODE, COMPLETIONS
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.compress.latent_cache import LatentCache
from utils.model.markers import wrap

openai = pytest.importorskip("openai")

TEXT = f"What is {wrap(CODE)}?"
DRAWN = {"temperature": 1.5, "seed": 3, "max_tokens": 12}

chat_body = functools.partial(prompts.chat_body, max_tokens=12)


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with LatentCache.open(tmp_path_factory.mktemp("cache")) as cache:
        compressor = Compressor.load(checkpoints["lclm"], settings=ON_CPU, cache=cache)
        with local_gateway.running(compressor, api_keys=("one", "two")) as address:
            yield address


@pytest.fixture
def gateway(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer one"}) as client:
        yield client


def choices_of(events: str) -> dict[int, list[dict[str, Any]]]:
    """A stream's choices, each one's pieces in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in events.splitlines():
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            found.setdefault(choice["index"], []).append(choice)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_several_choices(gateway: httpx.Client, temperature: float) -> None:
    body = chat_body(TEXT, n=3, **DRAWN | {"temperature": temperature})
    got = gateway.post(CHAT, json=body).json()
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in got["choices"]]
    assert len({*texts}) == (1 if temperature == 0 else 3)
    streamed = choices_of(gateway.post(CHAT, json={**body, "stream": True}).text)
    assert sorted(streamed) == [0, 1, 2]
    for number, pieces in streamed.items():
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == texts[number]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert pieces[-1]["finish_reason"] == got["choices"][number]["finish_reason"]
    alone = gateway.post(CHAT, json={**body, "n": 1}).json()["usage"]
    assert got["usage"]["prompt_tokens"] == alone["prompt_tokens"]
    assert got["usage"]["completion_tokens"] > alone["completion_tokens"]
    if temperature == 0:
        assert got["usage"]["completion_tokens"] == 3 * alone["completion_tokens"]
        assert texts[0] == gateway.post(CHAT, json={**body, "n": 1}).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fields", [{"temperature": 0}, DRAWN, {**DRAWN, "n": 2}])
def test_logprobs_of_a_chat(gateway: httpx.Client, fields: dict[str, Any]) -> None:
    body = chat_body(TEXT, logprobs=True, top_logprobs=2, **fields)
    got = gateway.post(CHAT, json=body).json()
    streamed = choices_of(gateway.post(CHAT, json={**body, "stream": True}).text)
    for choice in got["choices"]:
        content = choice["logprobs"]["content"]
        said = bytes(byte for token in content for byte in token["bytes"] or ())
        assert said.decode(errors="replace") == choice["message"]["content"] != ""
        for token in content:
            best, second = token["top_logprobs"]
            assert 0 >= best["logprob"] >= second["logprob"]
            assert best["logprob"] >= token["logprob"]
            if fields["temperature"] == 0:
                assert token.items() >= best.items()
        pieces = streamed[choice["index"]]
        assert [token for piece in pieces for token in piece["logprobs"]["content"]] == content
    assert gateway.post(CHAT, json=chat_body(TEXT)).json()["choices"][0]["logprobs"] is None


def test_logprobs_of_a_completion(gateway: httpx.Client) -> None:
    body = {"prompt": TEXT, "logprobs": 2, **DRAWN}
    (choice,) = gateway.post(COMPLETIONS, json=body).json()["choices"]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["text_offset"])
    for token, logprob, likeliest in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert likeliest[token] == logprob
        assert len(likeliest) in (2, 3)
    pieces = choices_of(gateway.post(COMPLETIONS, json={**body, "stream": True}).text)[0]
    for name, values in told.items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values
    places = zip(["", *told["tokens"]], told["tokens"], told["text_offset"], strict=False)
    whole = [(token, offset) for before, token, offset in places if not (before + token).count("bytes:")]
    assert whole
    assert all(choice["text"].startswith(token, offset) or token.startswith("<|") for token, offset in whole)
    (bare,) = gateway.post(COMPLETIONS, json={**body, "logprobs": 0}).json()["choices"]
    assert [*map(len, bare["logprobs"]["top_logprobs"])] == [1] * len(told["tokens"])


def test_the_openai_package_reads_logprobs_and_choices(gateway: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{gateway.base_url}/v1", api_key="one", max_retries=0) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model, messages=chat_body(TEXT)["messages"], n=2, logprobs=True, top_logprobs=1, **DRAWN
        )
        first = answer.choices[1].logprobs.content[0]
        assert first.top_logprobs[0].logprob >= first.logprob
        text = client.completions.create(model=model, prompt=TEXT, logprobs=1, max_tokens=2, temperature=0)
        assert text.choices[0].logprobs.text_offset[0] == 0
        assert answer.usage.prompt_tokens_details.cached_tokens <= answer.usage.prompt_tokens


def test_penalties_change_answers(gateway: httpx.Client) -> None:
    def said(**fields: Any) -> str:
        got = gateway.post(CHAT, json=chat_body(TEXT, temperature=0, **fields))
        return got.json()["choices"][0]["message"]["content"]

    assert said(frequency_penalty=0, presence_penalty=0.0) == said()
    repeating = said(frequency_penalty=-2)
    assert len({*repeating}) < len({*said(frequency_penalty=2, presence_penalty=2)})


def test_cached_tokens_are_rows_of_latents_and_the_keys_own(url: str, gateway: httpx.Client) -> None:
    body = chat_body(f"What is {wrap('no other test says this')}?", max_tokens=1, temperature=0)

    def told(key: str, **fields: Any) -> tuple[int, int]:
        got = gateway.post(CHAT, json={**body, **fields}, headers={"Authorization": f"Bearer {key}"}).json()
        return got["usage"]["prompt_tokens_details"]["cached_tokens"], got["code_llava"]["latents"]

    assert told("one")[0] == 0
    cached, latents = told("one")
    assert cached == latents > 0
    # Another key's requests find nothing of it.
    assert told("two")[0] == 0
    last = gateway.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    usage = json.loads(last.splitlines()[-4].removeprefix("data: "))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": latents}
