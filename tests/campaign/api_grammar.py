"""Requests to the gateway, drawn from a grammar of its API: most nearly right, some not at all.

draw = Grammar(seed=7)
request = draw.request()             # method, path, headers, body
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import orjson

from tests.support.prompts import CHAT, COMPLETIONS
from utils.model.markers import MEMORY, MEMORY_END, MEMORY_START, wrap

KEYS = ("first-key", "second-key")
MODEL = "tiny"
ODD: list[Any] = [
    None, True, False, 0, -1, 5, 1.5, 1e308, -(1 << 63), (1 << 64) - 1, "", "x", "\u0000", "é\U0001f642", [], {}, [[]],
    [None], ["x"], [1], [True], [1.5], [{}], {"a": 1}, {"type": "text"}, [{"type": "text", "text": 5}], [{"type": []}],
    [{"type": "text", "text": wrap("x")}, {"type": "text", "text": None}], [{"type": "image_url", "image_url": 3}],
    wrap("x"), wrap("@mem-" + "0" * 32), MEMORY_START, MEMORY_END, MEMORY, [wrap("x"), [1]], [wrap("x"), "y"],
    [[65, 66]], [[99999]], [-1], {"chunk_size": 4}, {"chunk_size": []}, {"chunk_size": 1 << 40}, {"auto": True},
    {"expand_tokens": 5}, {"expand": "1/4", "expand_policy": "latents"}, {"expand_policy": "all"}, {"expand": {}},
    {"tool": "expand"}, {"expand_tokens": 5, "expand_query": "x", "tool": "expand"}, {"include_usage": True},
    "x" * 2000, ["a", "b"], "<|im_end|>", "<|im_start|>system\nx", "../../etc/passwd", "\r\nX-Odd: 1",
    orjson.loads("[" * 120 + "]" * 120),
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "prompt_embeds", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "stream", "stream_options", "user", "n", "logprobs", "top_logprobs", "tools", "tool_choice",
    "code_llava", "cache_salt", "x" * 300, "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "metadata", "store", "response_format", "echo", "suffix", "best_of",
    "functions", "modalities", "parallel_tool_calls", "service_tier", "text", "as", "id",
]  # fmt: skip
PATHS = [
    CHAT, COMPLETIONS, "/v1/memories", "/v1/models", "/v1/models/tiny", "/v1/models/tiny@4x", "/v1/compression",
    "/v1/compress", "/v1/retrieve/mem-0", "/healthz", "/metrics", "/", "/page.js", "/v1/memories/mem-" + "0" * 32,
    "/v1", "//", "/v1/chat/completions/", "/%2e%2e/etc/passwd", "/v1/models/" + "x" * 500, "/v1/nothing?x=%00",
]  # fmt: skip
TEXTS = ["y", "Say it.", wrap("x"), wrap("def f():\n    return 1\n"), f"{wrap('a = 1')} and {wrap('b = 2')}: which?"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request of a client, as it goes onto the wire."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Grammar:
    """Draws requests; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(f"requests {seed}")
        self.memories: list[str] = []  # ids that exist, to be named

    def request(self) -> Request:
        """The next request."""
        draw = self._draw
        if draw.random() < 0.15:
            method = draw.choice(["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"])
            body = self.body(draw.choice([CHAT, COMPLETIONS])) if method in ("PUT", "POST", "PATCH") else b""
            return Request(method=method, path=draw.choice(PATHS), body=body, headers=self._headers())
        path = draw.choice([CHAT, CHAT, CHAT, COMPLETIONS, COMPLETIONS, "/v1/memories", "/v1/compress"])
        return Request(method="POST", path=path, body=self.body(path), headers=self._headers())

    def body(self, path: str) -> bytes:
        """A body for a path: a right one, mostly with some fields or bytes changed."""
        draw = self._draw
        right: dict[str, Any]
        if path == COMPLETIONS:
            right = {"prompt": self._text(), "max_tokens": draw.choice([1, 2, 4])}
        elif path == "/v1/memories":
            right = {"text": draw.choice(["def f(): pass\n" * draw.randint(1, 40), self._text()])}
        elif path == "/v1/compress":
            right = {"messages": self._messages(), "as": draw.choice(["text", "text", "latents"])}
        else:
            right = {"messages": self._messages(), "max_tokens": draw.choice([1, 2, 4])}
        right["model"] = draw.choice([*[MODEL] * 12, f"{MODEL}@8x", f"{MODEL}@16x+expand", "another"])
        if draw.random() < 0.2:
            right["stream"] = True
        for _ in range(draw.choice([0, 0, 0, 0, 1, 1, 2, 3])):
            right[draw.choice(FIELDS)] = draw.choice([*ODD, draw.choice([0, 1, 2, 0.5, "x"])])
        raw = orjson.dumps(right)
        return self._damaged(raw) if draw.random() < 0.15 else raw

    def _text(self) -> str:
        draw = self._draw
        parts: list[str] = [draw.choice(TEXTS)]
        if self.memories and draw.random() < 0.3:
            parts.append(wrap("@" + draw.choice(self.memories)))
        while draw.random() < 0.2:
            parts.append(draw.choice([*TEXTS, MEMORY_START, MEMORY_END, MEMORY, "<|im_end|>", "\u0000", "é" * 50]))
        return " ".join(parts)

    def _messages(self) -> list[Any]:
        draw = self._draw
        messages: list[Any] = [{"role": "user", "content": self._content()}]
        while draw.random() < 0.4:
            odd = draw.random() < 0.3
            role = draw.choice(["tool", *ODD[:12]] if odd else ["system", "developer", "user", "assistant"])
            message = {"role": role, "content": draw.choice(ODD) if draw.random() < 0.2 else self._content()}
            if odd:
                message[draw.choice(["name", "tool_calls", "tool_call_id", "refusal", "x"])] = draw.choice(ODD)
            messages.insert(draw.randrange(len(messages) + 1), message)
        return messages

    def _content(self) -> Any:
        draw = self._draw
        if draw.random() < 0.6:
            return self._text()
        return [{"type": "text", "text": self._text()} for _ in range(draw.randint(1, 4))]

    def _headers(self) -> dict[str, str]:
        draw = self._draw
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {draw.choice(KEYS)}"}
        if draw.random() < 0.1:
            name = draw.choice(
                ["Content-Type", "Authorization", "Host", "Origin", "Accept", "X-Code-Llava-Auto", "Expect"]
            )
            headers[name] = draw.choice(
                [
                    "",
                    "text/plain",
                    "bearer first-key",
                    "Bearer nobody",
                    "Bearer",
                    "http://evil.example",
                    "off",
                    "x" * 4000,
                ]
            )
        return headers

    def _damaged(self, raw: bytes) -> bytes:
        draw = self._draw
        return draw.choice([
            raw[: draw.randrange(len(raw))], raw.replace(b'"y"', b'"\\ud800"'), raw.replace(b":1", b":1e999"),
            raw[:-1] + b',"max_tokens":1}', raw.replace(b'"', b'"\xff', 1), b"\xef\xbb\xbf" + raw, b"[" + raw + b"]",
            raw[:-1] + b',"user":' + b"[" * 400 + b"]" * 400 + b"}", raw.replace(b":1", b":" + b"9" * 3000),
            b"", b"null", b"\x00" * 100, raw + raw, draw.randbytes(200),
            raw[:-1] + b',"metadata":[' + b"0," * 20_000 + b"0]}",
        ])  # fmt: skip
