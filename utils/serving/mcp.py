"""Stored memories as tools for coding agents: an MCP server over stdio, in front of a running gateway.

uv run --with mcp python -m utils.serving.mcp --gateway-url http://127.0.0.1:8080

A file that is stored by its path never passes through the agent's own context: what comes back are answers about it, or
the lines that a question needs.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

from utils.cli import EXIT_OK, make_parser, run_command
from utils.client.memories import MemoryClient
from utils.errors import CodeLlavaError, ConfigError, DatasetError
from utils.files import decode_text
from utils.serving.gateway import KEY_VARIABLE
from utils.serving.settings import read_keys

INSTRUCTIONS = (
    "Long texts as compressed memories. Store a file or a text, keep its id, and ask about it: the answer comes from a "
    "small model that reads the memory compressed. For exact names, numbers or code, expand the lines that a question "
    "needs."
)
Ids = list[str]
# More than a gateway takes by default.
_MAX_FILE_BYTES = 64 << 20


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.serving.mcp`."""
    parser = make_parser(
        "Offer a gateway's memories to coding agents as MCP tools: store, list, ask, expand, delete.",
        examples="""\
  python -m utils.serving.gateway --backend local
  uv run --with mcp python -m utils.serving.mcp --root ~/project""",
        prog="python -m utils.serving.mcp",
    )
    parser.add_argument("--gateway-url", default="http://127.0.0.1:8080", help="default http://127.0.0.1:8080")
    parser.add_argument("--api-key", metavar="KEY", help=f"the gateway's key; default ${KEY_VARIABLE}, else none")
    parser.add_argument("--model", help="which model answers; default the gateway's first")
    parser.add_argument("--root", type=Path, default=Path(), help="folder whose files may be stored; default this one")
    parser.add_argument("--timeout", type=float, default=600.0, help="the gateway's longest silence; default 600 s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    if not args.root.is_dir():
        raise ConfigError(f"--root {args.root} is no folder")
    keys = read_keys([args.api_key] if args.api_key else None, os.environ.get(KEY_VARIABLE), KEY_VARIABLE)
    if len(keys) > 1:
        raise ConfigError(f"${KEY_VARIABLE} holds {len(keys)} keys: say with --api-key which one is this agent's")
    client = MemoryClient(args.gateway_url, keys[0] if keys else None, args.model, args.timeout)
    build_server(client, args.root).run("stdio")
    return EXIT_OK


def build_server(client: MemoryClient, root: Path) -> Any:
    """The server and its tools.

    Args:
        client: Of the gateway.
        root: Files below it may be stored.

    Raises:
        ConfigError: The package mcp is not installed.
    """
    # Not in the lock file: who wants tools for an agent brings it along.
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
    except ImportError:
        raise ConfigError(
            "this needs the package mcp, version 2 or later: uv run --with mcp python -m utils.serving.mcp"
        ) from None
    server = MCPServer("code-llava", instructions=INSTRUCTIONS)
    # Of what this process stored: the gateway keeps texts without names.
    names: dict[str, str] = {}

    def tool(function: Any) -> Any:
        """Offer a function; errors that are no bugs of ours are told to the model."""

        @functools.wraps(function)
        async def told(**arguments: Any) -> Any:
            try:
                return await function(**arguments)
            except CodeLlavaError as error:
                raise ToolError(str(error)) from None

        return server.tool()(told)

    @tool
    async def store(path: str = "", text: str = "") -> dict[str, Any]:
        """Store a file (path) or a text as a memory and return its id. Prefer path: the file is read here."""
        if bool(path) == bool(text):
            raise ConfigError("expected either a path or a text")
        memory = await client.store(read_file(path, root) if path else text)
        names[memory["id"]] = path or "text"
        return {**memory, "name": names[memory["id"]]}

    @tool
    async def list() -> dict[str, Any]:
        """List the stored memories: id, name where this session stored it, bytes, when it expires."""
        return {"memories": [{**memory, "name": names.get(memory["id"])} for memory in await client.list()]}

    @tool
    async def ask(question: str, memory_ids: Ids, max_tokens: int = 512) -> dict[str, Any]:
        """Ask a question about memories. They are read compressed: details may be wrong, expand shows them exactly."""
        answer = await client.ask(question, memory_ids, max_tokens)
        report = answer.get("code_llava", {})
        counts = {name: report.get(name) for name in ("memory_tokens", "latents", "text_rows")}
        return {"answer": answer["choices"][0]["message"]["content"], **counts}

    @tool
    async def expand(memory_ids: Ids, question: str = "", max_tokens: int = 1024) -> str:
        """Show the exact lines of memories that a question needs; without a question the whole text."""
        if question.strip():
            return await client.expand(question, memory_ids, max_tokens)
        return "".join([await client.whole(memory_id) for memory_id in memory_ids])

    @tool
    async def delete(memory_id: str) -> dict[str, Any]:
        """Delete a memory."""
        await client.delete(memory_id)
        names.pop(memory_id, None)
        return {"id": memory_id, "deleted": True}

    return server


def read_file(path: str, root: Path) -> str:
    """A file's text.

    Raises:
        DatasetError: It is outside the root, no regular file, too long or no text.
    """
    found = (root / path).resolve()
    if not found.is_relative_to(root.resolve()):
        raise DatasetError(f"{path} is outside {root}: start this server with another --root")
    if not found.is_file():
        raise DatasetError(f"{path} is no file in {root}")
    if (size := found.stat().st_size) > _MAX_FILE_BYTES:
        raise DatasetError(f"{path} has {size} bytes, the limit is {_MAX_FILE_BYTES}")
    try:
        text = decode_text(found.read_bytes())
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not {error.encoding.upper()} text (byte {error.start})") from None
    if "\0" in text:
        raise DatasetError(f"{path} is no text: it holds a zero byte")
    return text


if __name__ == "__main__":
    sys.exit(main())
