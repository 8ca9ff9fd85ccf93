"""The snippets of docs/serving.md, run by the real clients against a gateway, and LiteLLM's proxy in front of one."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import gateway_server, local_gateway, uv_run
from tests.support.fake_server import FakeServer, answer
from tests.support.processes import free_port
from tests.support.prompts import CHAT, chat_body
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.files import PROJECT_ROOT
from utils.serving.selected_text import TextSelector

pytestmark = [pytest.mark.clients, pytest.mark.slow]

DOCUMENT = (PROJECT_ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```(python|sh)\n# uv: (\S+)\n(.*?)```", DOCUMENT, re.S)
(PROXY,) = re.findall(r"```yaml\n(model_list:.*?)```", DOCUMENT, re.S)
ADDRESS = "http://127.0.0.1:8080"
NAME = "code-llava-smollm2"
QUESTION = "What is this? <|memory_start|>def area(w, h): return w * h<|memory_end|>"


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = shutil.copytree(checkpoints["lclm"], tmp_path_factory.mktemp("named") / NAME)
    with local_gateway.running(Compressor.load(folder, settings=ON_CPU)) as address:
        yield address


def test_there_is_a_snippet_for_each_client() -> None:
    packages = [package for _, package, _ in SNIPPETS]
    wanted = ["openai", "openai", "litellm", "langchain-openai", "llama-index-llms-openai-like", "llm"]
    assert packages == wanted


@pytest.mark.parametrize(("language", "package", "code"), SNIPPETS, ids=lambda value: value[:30].strip())
def test_a_snippet_prints_the_answer(url: str, tmp_path: Path, language: str, package: str, code: str) -> None:
    assert code.count(ADDRESS) == 1
    file = tmp_path / f"snippet.{language}"
    file.write_text(code.replace(ADDRESS, url), encoding="utf-8")
    done = subprocess.run(
        uv_run.command(package, "python" if language == "python" else "bash", file), capture_output=True, check=False,
        env=uv_run.environment(LLM_USER_PATH=str(tmp_path / "llm")), cwd=tmp_path, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    body = chat_body(QUESTION, model=NAME, max_tokens=16, temperature=0)
    said = httpx.post(url + CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert said
    assert done.stdout.rstrip(b"\n") == said.rstrip("\n").encode()


LONG = "".join(f"setting_{number} = {number * 7919}\n" for number in range(100))


def tool_turns(number: int, content: str) -> list[dict[str, Any]]:
    call = {"id": f"call_{number}", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": content},
    ]


MESSAGES = [
    {"role": "user", "content": "Read the file. What is setting_17?"},
    *tool_turns(1, LONG),
    {"role": "assistant", "content": "It is 134623."},
    {"role": "user", "content": "Are you sure?"},
]


@contextlib.contextmanager
def litellm_proxy(gateway: str, backend: str, folder: Path) -> Iterator[httpx.Client]:
    """The proxy with the document's settings, in front of both."""
    config = PROXY.replace("http://127.0.0.1:8000", backend).replace(ADDRESS, gateway)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    port = free_port()
    command = uv_run.command(
        "litellm[proxy]", "litellm", "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", port
    )
    key = f"sk-{secrets.token_hex(16)}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=uv_run.environment(LITELLM_MASTER_KEY=key), cwd=folder
        )
    try:
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, headers=headers) as client:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health/liveliness").status_code == 200:
                        break
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def test_litellms_proxy_sends_latents_as_they_are(
    compressor: Compressor, server: FakeServer, backend: FakeServer, tmp_path: Path
) -> None:
    with (
        gateway_server.running(compressor, server.url, auto_memory=100) as gateway,
        litellm_proxy(gateway, server.url, tmp_path) as proxy,
    ):
        got = proxy.post(CHAT, json={"model": "code-llava", "messages": MESSAGES})
        assert got.status_code == 200, got.text
        expected = httpx.post(f"{gateway}/v1/compress", json={"messages": [MESSAGES[0], MESSAGES[2]]}).json()
    sent = backend.bodies[-1]["messages"]
    assert [message["role"] for message in sent] == [message["role"] for message in MESSAGES]
    assert sent[2]["content"] == expected["messages"][1]["content"]
    assert [part["type"] for part in sent[2]["content"]] == ["text", "prompt_embeds", "text"]
    assert sent[4]["content"] == "Are you sure?"


def test_litellms_proxy_sends_text_and_retrieves_the_rest(
    checkpoints: dict[str, Path], server: FakeServer, backend: FakeServer, tmp_path: Path
) -> None:
    def call_the_tool(handler: Any) -> None:
        text = handler.asked["messages"][2]["content"]
        name = re.search(r"hash=([0-9a-f]{24})\]", text)
        assert name is not None
        function = {"name": "headroom_retrieve", "arguments": json.dumps({"hash": name[1]})}
        call = {"id": "call_2", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        handler.reply(200, {"choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}], "usage": {}})

    with (
        gateway_server.running(TextSelector.load(checkpoints["lclm"]), server.url, auto_memory=100) as gateway,
        litellm_proxy(gateway, server.url, tmp_path) as proxy,
    ):
        backend.script = [call_the_tool, answer("Yes.")]
        got = proxy.post(CHAT, json={"model": "code-llava", "messages": MESSAGES})
        assert got.status_code == 200, got.text
    first, second = backend.bodies[-2:]
    selected = first["messages"][2]["content"]
    assert "setting_17 = 134623\n" in selected
    assert len(selected) < len(LONG) / 3
    assert "headroom_retrieve" in [tool["function"]["name"] for tool in first["tools"]]
    assert second["messages"][-1]["content"] == LONG
    assert got.json()["choices"][0]["message"]["content"] == "Yes."
