"""The MCP server: what it lets an agent read here, and its tools as the mcp package's own client calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import local_gateway, uv_run
from utils.checkpoint.settings import ON_CPU
from utils.compress.compressor import Compressor
from utils.errors import DatasetError
from utils.files import PROJECT_ROOT
from utils.serving import mcp

TEXT = "".join(f"setting_{number} = {number * 7919}\n" for number in range(40))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "settings.py").write_text(TEXT)
    (tmp_path / "secret.txt").write_text("tiger")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "zero.bin").write_bytes(b"a\0b")
    return folder


def test_files_of_the_root_are_read(root: Path) -> None:
    for path in ("src/settings.py", str(root / "src" / "settings.py"), "src/../src/settings.py"):
        assert mcp.read_file(path, root) == TEXT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.txt", "outside"),
        ("link.txt", "outside"),
        ("/etc/passwd", "outside"),
        ("src", "no file"),
        ("missing.py", "no file"),
        ("latin.txt", "not UTF-8"),
        ("zero.bin", "zero byte"),
    ],
)
def test_what_is_not_read(root: Path, path: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        mcp.read_file(path, root)


def test_what_cannot_start_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    assert mcp.main(["--root", str(root)]) == 1
    assert "uv run --with mcp" in capsys.readouterr().err
    assert mcp.main(["--root", str(root / "missing")]) == 1
    assert "is no folder" in capsys.readouterr().err
    monkeypatch.setenv("CODE_LLAVA_GATEWAY_KEY", "one,two")
    assert mcp.main(["--root", str(root)]) == 1
    assert "2 keys" in capsys.readouterr().err


CALLS = """
import asyncio, json, sys
from mcp import Client, StdioServerParameters, stdio_client

async def main(arguments, environment):
    async def call(name, **given):
        result = await client.call_tool(name, given)
        told[name] = result.structured_content if not result.is_error else result.content[0].text
        return told[name]

    told = {}
    server = StdioServerParameters(command=sys.executable, args=arguments, env=environment)
    async with Client(stdio_client(server)) as client:
        told["tools"] = [tool.name for tool in (await client.list_tools()).tools]
        name = (await call("store", path="src/settings.py"))["id"]
        await call("list")
        await call("ask", memory_ids=[name], question="What is setting_17?", max_tokens=4)
        await call("expand", memory_ids=[name], question="What is setting_17?", max_tokens=60)
        told["whole"] = (await client.call_tool("expand", {"memory_ids": [name]})).structured_content["result"]
        await call("delete", memory_id=name)
        told["again"] = (await client.call_tool("delete", {"memory_id": name})).content[0].text
        told["outside"] = (await client.call_tool("store", {"path": "../secret.txt"})).content[0].text
        told["neither"] = (await client.call_tool("store", {})).content[0].text
    print(json.dumps(told))

asyncio.run(main(json.loads(sys.argv[1]), json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path]) -> Iterator[str]:
    with local_gateway.running(Compressor.load(checkpoints["lclm"], settings=ON_CPU), api_keys=("key",)) as address:
        yield address


@pytest.mark.clients
@pytest.mark.slow
def test_the_packages_own_client_uses_the_tools(url: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    arguments = ["-m", "utils.serving.mcp", "--gateway-url", url, "--root", str(root)]
    environment = uv_run.environment(PYTHONPATH=str(PROJECT_ROOT), CODE_LLAVA_GATEWAY_KEY="key")
    command = uv_run.command(
        "mcp", "python", tmp_path / "calls.py", json.dumps(arguments), json.dumps(environment), also=("httpx",)
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=uv_run.environment(), cwd=tmp_path, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert sorted(told["tools"]) == ["ask", "delete", "expand", "list", "store"]
    stored = told["store"]
    assert (stored["name"], stored["bytes"]) == ("src/settings.py", len(TEXT))
    assert [memory["name"] for memory in told["list"]["memories"]] == ["src/settings.py"]
    assert told["ask"]["memory_tokens"] == len(TEXT)
    assert 0 < told["ask"]["latents"] < len(TEXT)
    assert isinstance(told["ask"]["answer"], str)
    assert "setting_17 = 134623\n" in told["expand"]["result"]
    assert "setting_3 " not in told["expand"]["result"]
    assert told["whole"] == TEXT
    assert told["delete"] == {"id": stored["id"], "deleted": True}
    assert "404" in told["again"]
    assert "outside" in told["outside"]
    assert "either a path or a text" in told["neither"]
