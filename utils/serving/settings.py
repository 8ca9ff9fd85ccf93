"""What a gateway is told when it starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from utils.errors import ConfigError

OnError = Literal["fail", "plain-text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits, keys and policies.

    Attributes:
        backend_url: The vLLM server behind the gateway, with or without `/v1`.
        backend_key: Key for it; None looks into the environment. Clients never see it.
        api_keys: Keys of which clients must send one; none lets everyone in.
        on_error: What to do when the encoder fails: refuse the request, or send the memory as plain text and say so.
        max_body_bytes: Longest request body.
        max_spans: Most memory spans in one request.
        max_request_rows: Most rows of all prompts of one request; None: four times the decoder's positions, which are
            the limit of each prompt.
        max_waiting: Requests that may wait for the encoder; more are told to come back.
        max_batch_tokens: Memory tokens encoded together.
        max_memories: Texts kept under `/v1/memories`, of all keys in equal shares.
        max_memories_bytes: Their bytes together.
        memory_ttl_s: How long one is kept after its last use.
        timeout_s: Longest silence of the backend.
    """

    backend_url: str
    backend_key: str | None = None
    api_keys: tuple[str, ...] = ()
    on_error: OnError = "fail"
    max_body_bytes: int = 64 << 20
    max_spans: int = 1024
    max_request_rows: int | None = None
    max_waiting: int = 256
    max_batch_tokens: int = 32768
    max_memories: int = 1024
    max_memories_bytes: int = 256 << 20
    memory_ttl_s: float = 86400.0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not all(key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty, which would let everyone in: give a key, or none at all")
        if self.memory_ttl_s <= 0:
            raise ConfigError(f"--memory-ttl must be more than 0 seconds, got {self.memory_ttl_s:g}")


def read_keys(flags: Sequence[str] | None, variable: str | None, variable_name: str) -> tuple[str, ...]:
    """The keys that clients may send.

    Args:
        flags: One key each; None or empty where the flag was not given.
        variable: The environment's keys, separated by commas, used without flags; None where it is not set.
        variable_name: For messages.

    Raises:
        ConfigError: A key is empty: a variable that was meant to hold one is not set.
    """
    if flags:
        where, keys = "--api-key", [key.strip() for key in flags]
    elif variable is not None:
        where, keys = f"${variable_name}", [key.strip() for key in variable.split(",")]
    else:
        return ()
    if not all(key.strip(", ") for key in keys):
        raise ConfigError(
            f"{where} holds an empty key, which would let everyone in: give a key, or leave {where} out (unset it) to "
            "serve without keys"
        )
    return tuple(dict.fromkeys(keys))


def owner_of(key: bytes) -> str:
    """What memories and cache entries of a key are filed under; the same after a restart, and not the key."""
    return hashlib.sha256(b"code-llava owner " + key).hexdigest()[:32]
