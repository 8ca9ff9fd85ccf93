"""Prompts that tests ask, and the requests that carry them."""

from __future__ import annotations

from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CODE = "def area(width, height):\n    return width * height\n"


def chat_body(content: Any, **fields: Any) -> dict[str, Any]:
    """A chat of one user turn."""
    return {"messages": [{"role": "user", "content": content}], **fields}
