"""Texts that were sent once and are named later: `<|memory_start|>@mem-…<|memory_end|>`.

A text belongs to the key that stored it: for other keys it does not exist. Ids cannot be guessed; texts live in memory
and end with the process, with their time, or where their owner's room is needed for newer ones, the least recently used
first.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from utils.serving.api_error import ApiError, shown

_REFERENCE = re.compile(r"@(mem-[0-9a-f]{32})")


@dataclass(slots=True, kw_only=True, eq=False)
class Memory:
    """One stored text.

    Attributes:
        id: What it is called; a random one, or one that follows from the text and a secret.
        text: The text.
        created: Seconds since the epoch.
        size_bytes: Bytes of the text in UTF-8.
        expires: Seconds since the epoch; each use moves it.
        token_ids: Its encoder tokens, once a prompt has named it.
        is_too_long: No prompt can hold it; known once a prompt has named it.
    """

    id: str
    text: str
    created: int
    size_bytes: int
    expires: float
    token_ids: array[int] | None = field(default=None, repr=False)
    is_too_long: bool = False

    def summary(self) -> dict[str, str | int]:
        """What the API says about it; not the text."""
        return {
            "id": self.id,
            "object": "memory",
            "created": self.created,
            "expires": int(self.expires),
            "bytes": self.size_bytes,
        }


class MemoryStore:
    """Stored texts within limits; any thread may use it.

    Args:
        max_count: Most texts of all owners.
        max_bytes: Most bytes of all texts.
        ttl_s: How long a text is kept after its last use.
        num_owners: Owners that there may be; each has an equal share of the room, so that none can take another's.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        max_count: int,
        max_bytes: int,
        ttl_s: float = 86400.0,
        num_owners: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.max_count = max(1, max_count // max(1, num_owners))
        self.max_bytes = max_bytes // max(1, num_owners)
        self.ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(32)
        # Each owner's, the least recently used first: so they also expire in this order.
        self._memories: dict[str, OrderedDict[str, Memory]] = {}

    def add(self, text: str, owner: str = "") -> Memory:
        """Store a text; the owner's least recently used ones leave where it needs their room.

        Raises:
            ApiError: 413, it is longer than all the room of one owner.
        """
        size = len(text.encode())
        if size > self.max_bytes:
            raise ApiError(413, f"the text has {size} bytes, the limit for all memories of a key is {self.max_bytes}")
        now = self._clock()
        memory = Memory(
            id=f"mem-{secrets.token_hex(16)}", text=text, created=int(now), size_bytes=size, expires=now + self.ttl_s
        )
        with self._lock:
            own = self._living(owner)
            self._make_room(own, size)
            own[memory.id] = memory
        return memory

    def keep(self, texts: Sequence[str], owner: str = "") -> Sequence[Memory]:
        """Store texts under ids that follow from them: one that is here already is used, and stays once.

        So a chat that is compressed again has the same ids in it. Who does not know the process's secret can neither
        guess one nor tell from it what it stands for.

        Raises:
            ApiError: 413, they are more than one owner has room for.
        """
        wanted = {self._name_of(text, owner): text for text in texts}
        sizes = {memory_id: len(text.encode()) for memory_id, text in wanted.items()}
        if len(wanted) > self.max_count or sum(sizes.values()) > self.max_bytes:
            raise ApiError(
                413, f"{len(wanted)} texts of {sum(sizes.values())} bytes are to be kept, a key has room for "
                f"{self.max_count} of {self.max_bytes} bytes",
            )  # fmt: skip
        now = self._clock()
        with self._lock:
            own = self._living(owner)
            for memory_id, text in wanted.items():
                memory = own.pop(memory_id, None) or Memory(
                    id=memory_id, text=text, created=int(now), size_bytes=sizes[memory_id], expires=0
                )
                memory.expires = now + self.ttl_s
                self._make_room(own, memory.size_bytes)
                own[memory_id] = memory
            return [own[self._name_of(text, owner)] for text in texts]

    def list(self, owner: str = "") -> list[Memory]:
        """All of one owner, the least recently used first."""
        with self._lock:
            return [*self._living(owner).values()]

    def get(self, memory_id: str, owner: str = "") -> Memory:
        """One memory, which is thereby used.

        Raises:
            ApiError: 404, this owner has none of this name.
        """
        with self._lock:
            memory = self._find(memory_id, owner)
            memory.expires = self._clock() + self.ttl_s
            self._memories[owner].move_to_end(memory_id)
            return memory

    def delete(self, memory_id: str, owner: str = "") -> None:
        """Remove one memory.

        Raises:
            ApiError: 404, this owner has none of this name.
        """
        with self._lock:
            self._find(memory_id, owner)
            del self._memories[owner][memory_id]

    def resolve(self, span_text: str, owner: str = "") -> Memory | None:
        """The memory where a span is a reference, else None.

        Raises:
            ApiError: 404, the reference names nothing of this owner.
        """
        match = _REFERENCE.fullmatch(span_text.strip())
        return self.get(match[1], owner) if match else None

    def _make_room(self, own: OrderedDict[str, Memory], size_bytes: int) -> None:
        taken = sum(other.size_bytes for other in own.values())
        while own and (len(own) >= self.max_count or taken + size_bytes > self.max_bytes):
            taken -= own.popitem(last=False)[1].size_bytes

    def _name_of(self, text: str, owner: str) -> str:
        # As long as what guardrails take for such an id.
        return hmac.new(self._secret, f"{owner} {text}".encode(), hashlib.sha256).hexdigest()[:24]

    def _find(self, memory_id: str, owner: str) -> Memory:
        memory = self._living(owner).get(memory_id)
        if memory is None:
            raise ApiError(
                404,
                f"no memory {shown(memory_id)}: it was deleted, has expired or made room, or the gateway restarted",
            )
        return memory

    def _living(self, owner: str) -> OrderedDict[str, Memory]:
        """One owner's texts, after the expired ones of all owners have left."""
        now = self._clock()
        for own in self._memories.values():
            while own and next(iter(own.values())).expires <= now:
                own.popitem(last=False)
        return self._memories.setdefault(owner, OrderedDict())
