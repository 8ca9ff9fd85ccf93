"""What a gateway is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OnError = Literal["fail", "plain-text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits, keys and policies.

    Attributes:
        backend_url: The vLLM server behind the gateway, with or without `/v1`.
        backend_key: Key for it; None looks into the environment. Clients never see it.
        api_key: Key that clients must send; None lets everyone in.
        on_error: What to do when the encoder fails: refuse the request, or send the memory as plain text and say so.
        max_body_bytes: Longest request body.
        max_spans: Most memory spans in one request.
        max_waiting: Requests that may wait for the encoder; more are told to come back.
        max_batch_tokens: Memory tokens encoded together.
        max_memories: Texts kept under `/v1/memories`.
        max_memories_bytes: Their bytes together.
        timeout_s: Longest silence of the backend.
    """

    backend_url: str
    backend_key: str | None = None
    api_key: str | None = None
    on_error: OnError = "fail"
    max_body_bytes: int = 64 << 20
    max_spans: int = 1024
    max_waiting: int = 256
    max_batch_tokens: int = 32768
    max_memories: int = 1024
    max_memories_bytes: int = 256 << 20
    timeout_s: float = 600.0
