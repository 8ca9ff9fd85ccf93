"""The client against a real vLLM server: what it answers to latents is what the local decoder answers, to the letter.

One server serves the embedded checkpoint's decoder in float32; starting it takes a minute or two.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("orjson")

from tests.support.prompts import CODE
from tests.support.vllm_server import local_answer
from utils.client.server_client import VllmClient
from utils.errors import ServerError
from utils.model.markers import MEMORY_END, MEMORY_START, wrap

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NEW_TOKENS = 16


def use(url: str, action: Callable[[VllmClient], Awaitable[Any]]) -> Any:
    """Run one action with a client."""

    async def run() -> Any:
        async with VllmClient(url) as client:
            return await action(client)

    return asyncio.run(run())


def spans(count: int) -> str:
    return " ".join(f"File {n}: {wrap(CODE.replace('area', f'area_{n}'))}" for n in range(count))


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("streamed", [False, True])
def test_latents_answer_as_the_local_decoder(
    vllm_url: str, default_compressor: Any, decoder: Any, count: int, streamed: bool
) -> None:
    prompt = default_compressor.parse_chat([{"role": "user", "content": f"What is this? {spans(count)}"}])
    values_TD = default_compressor.compress([prompt])[0].values_TD
    on_text = (lambda text: None) if streamed else None
    got = use(
        vllm_url, lambda client: client.complete(values_TD, max_tokens=NEW_TOKENS, temperature=0, on_text=on_text)
    )
    assert got.text == local_answer(decoder, default_compressor, prompt, NEW_TOKENS)
    assert got.prompt_tokens == len(values_TD)
    assert got.completion_tokens > 0


def test_embeddings_of_plain_text_answer_as_the_text(vllm_url: str, default_compressor: Any) -> None:
    text = "The capital of France is"
    values_TD = default_compressor.compress([default_compressor.parse_raw(text)])[0].values_TD
    of_text, of_rows = (
        use(vllm_url, lambda client, given=given: client.complete(given, max_tokens=NEW_TOKENS, temperature=0))
        for given in (text, values_TD)
    )
    assert of_rows.text == of_text.text
    assert of_rows.prompt_tokens == of_text.prompt_tokens


@pytest.mark.parametrize("count", [1, 2, 20])
def test_chat_parts_answer_as_the_local_prompt(
    vllm_url: str, default_compressor: Any, decoder: Any, count: int
) -> None:
    text = f"What is this? {spans(count)} Say it in one word."
    prompt = default_compressor.parse_chat([{"role": "user", "content": text}])
    embeds = default_compressor.compress([prompt])[0]

    async def action(client: VllmClient) -> Any:
        assert await client.joins_parts() is False
        content: list[dict[str, str]] = []
        before, *pieces = text.split(MEMORY_START)
        for piece, (start, stop) in zip(pieces, embeds.spans, strict=True):
            content.append({"type": "text", "text": before + MEMORY_START})
            content.append(client.embeds_part(embeds.values_TD[start:stop]))
            before = MEMORY_END + piece.split(MEMORY_END)[1]
        content.append({"type": "text", "text": before})
        return await client.chat([{"role": "user", "content": content}], max_tokens=NEW_TOKENS, temperature=0)

    got = use(vllm_url, action)
    assert got.prompt_tokens == len(embeds.values_TD)
    assert got.text == local_answer(decoder, default_compressor, prompt, NEW_TOKENS)


def test_the_same_rows_again_hit_the_servers_prefix_cache(vllm_url: str, default_compressor: Any) -> None:
    # Code that no other test sent: the first request must find the server's cache cold.
    code = CODE.replace("area", "volume_of_prefix_cache_test") * 100
    prompt = default_compressor.parse_raw(wrap(code) + " What is this?")
    values_TD = default_compressor.compress([prompt])[0].values_TD
    first, second = (use(vllm_url, lambda client: client.complete(values_TD, max_tokens=1)) for _ in range(2))
    assert not first.cached_tokens
    assert second.cached_tokens >= 128  # one block


def test_preflight_tells_a_wrong_width_and_a_wrong_model(vllm_url: str) -> None:
    assert use(vllm_url, lambda client: client.preflight(width=576)).max_model_len == 4096
    with pytest.raises(ServerError, match=r"the rows are 575 wide, .* 576"):
        use(vllm_url, lambda client: client.preflight(width=575))

    async def other(client: VllmClient) -> None:
        client.model = "other"
        await client.preflight()

    with pytest.raises(ServerError, match="has no model 'other', it serves tiny"):
        use(vllm_url, other)


def test_the_commands_together(
    vllm_url: str, default_compressor: Any, decoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from general import generation_test, step1

    file = str(tmp_path / "rows.npy")
    assert step1.main(["--output", file, "--chunk-size", "8", "--dtype", "float32", "--device", "cpu"]) == 0
    capsys.readouterr()
    flags = ["--embedding-file", file, "--server-url", vllm_url + "/v1", "--max-tokens", str(NEW_TOKENS), "--json"]
    assert generation_test.main(flags) == 0
    result = json.loads(capsys.readouterr().out)
    prompt = default_compressor.parse_chat(step1.PROMPT)
    assert result["text"] == local_answer(decoder, default_compressor, prompt, NEW_TOKENS)
