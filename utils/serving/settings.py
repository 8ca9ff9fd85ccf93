"""What a gateway is told when it starts."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.compress.select import Expansion

OnError = Literal["fail", "plain-text"]
DEFAULT_BACKEND_URL = "http://127.0.0.1:8000"
# From so many tokens on a part of a chat becomes memory without markers, where that is wanted.
DEFAULT_AUTO_TOKENS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """How long clients may keep the gateway waiting, and how many may be connected.

    Attributes:
        header_timeout_s: From a connection's or a request's first byte to the end of its headers.
        keep_alive_s: A connection without a request is closed after it.
        body_pause_s: Longest pause inside a body.
        body_timeout_s: For a whole body, to which `body_bytes_per_s` adds time for what has arrived.
        body_bytes_per_s: Slowest rate of a long body.
        write_timeout_s: Longest time in which a client reads nothing of what is being sent.
        linger_s: How long the rest of a request that was refused is read and dropped, so that its client can read why.
        shutdown_s: How long running answers may take to finish after SIGTERM.
        max_connections: Most connections; fewer where the system allows fewer open files.
    """

    header_timeout_s: float = 20.0
    keep_alive_s: float = 30.0
    body_pause_s: float = 20.0
    body_timeout_s: float = 30.0
    body_bytes_per_s: float = 256 << 10
    write_timeout_s: float = 30.0
    linger_s: float = 2.0
    shutdown_s: float = 20.0
    max_connections: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits, keys and policies.

    Attributes:
        backend_url: The vLLM server behind the gateway, with or without `/v1`.
        backend_key: Key for it; None looks into the environment. Clients never see it.
        host: Address that the gateway listens on; on a loopback address only loopback names are answered.
        allowed_hosts: Further names under which clients may ask for the gateway.
        allowed_origins: Web pages' origins that may use the gateway from a browser.
        connections: Deadlines and number of the clients' connections.
        api_keys: Keys of which clients must send one; none lets everyone in.
        on_error: What to do when the encoder fails: refuse the request, or send the memory as plain text and say so.
        expansion: How much of the memory stays text in requests that say nothing about it; None for nothing.
        auto_memory: Parts of chats from so many tokens on become memory without markers, in requests that say nothing
            about it; None: markers alone count.
        max_body_bytes: Longest request body.
        max_bodies_bytes: All bodies in work together; None: four of the longest.
        max_spans: Most memory spans in one request.
        max_request_rows: Most rows of all prompts of one request; None: four times the decoder's positions, which are
            the limit of each prompt.
        max_waiting: Requests that may wait for the encoder; more are told to come back.
        max_batch_tokens: Memory tokens encoded together.
        max_memories: Texts kept under `/v1/memories`, of all keys in equal shares.
        max_memories_bytes: Their bytes together.
        memory_ttl_s: How long one is kept after its last use.
        timeout_s: Longest silence of the backend.
        max_answer_bytes: Longest answer of the backend that is not streamed.
    """

    backend_url: str = DEFAULT_BACKEND_URL
    backend_key: str | None = None
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    api_keys: tuple[str, ...] = ()
    on_error: OnError = "fail"
    expansion: Expansion | None = None
    auto_memory: int | None = None
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int | None = None
    max_spans: int = 1024
    max_request_rows: int | None = None
    max_waiting: int = 256
    max_batch_tokens: int = 32768
    max_memories: int = 1024
    max_memories_bytes: int = 256 << 20
    memory_ttl_s: float = 86400.0
    timeout_s: float = 600.0
    max_answer_bytes: int = 256 << 20

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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost may lead anywhere."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def owner_of(key: bytes) -> str:
    """What memories and cache entries of a key are filed under; the same after a restart, and not the key."""
    return hashlib.sha256(b"code-llava owner " + key).hexdigest()
