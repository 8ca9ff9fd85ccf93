"""Clients that send half requests, leave, stop reading or say what is no HTTP: they are let go, and others go on."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from tests.campaign.api_grammar import KEYS
from tests.campaign.figures import Figures
from tests.campaign.gateways import RunningGateway, ask_the_canary, running
from tests.campaign.jobs import Tools
from tests.support.prompts import CHAT, chat_body
from utils.model.markers import wrap

# Idle connections have 30 s and more (docs/reliability.md); then all of them are gone.
_SETTLED_S = 60.0
_STOPPED_S = 30.0


def run(work: Path, tools: Tools, count: int, seed: int) -> Figures:
    """Let so many odd clients come, and see that nothing of them stays; then end the gateway amid half requests."""
    figures, chance = Figures("odd clients"), random.Random(f"clients {seed}")
    with running(tools, work) as gateway:
        wanted = ask_the_canary(gateway)
        files, threads = gateway.num_files(), gateway.num_threads()
        held: list[socket.socket] = []
        for number in range(count):
            kind = chance.choice(list(CLIENTS))
            client = _connect(gateway)
            stays = False
            with contextlib.suppress(OSError):
                stays = CLIENTS[kind](client, chance)
            if stays:
                held.append(client)
            else:
                client.close()
            figures.add(kind)
            if number % 50 == 49 and (said := ask_the_canary(gateway)) != wanted:
                figures.failures.append(f"seed {seed}, after client {number}: the canary answers {said!r}")
        for client in held:
            client.close()
        end = time.monotonic() + _SETTLED_S
        while gateway.num_files() > files + 4 and time.monotonic() < end:
            time.sleep(0.5)
        for name, now, before in (
            ("files", gateway.num_files(), files), ("threads", gateway.num_threads(), threads + 40),
        ):  # fmt: skip
            if now > before + 4:
                figures.failures.append(f"seed {seed}: {now} {name} are open, {before} were")
        if (said := ask_the_canary(gateway)) != wanted:
            figures.failures.append(f"seed {seed}: at last the canary answers {said!r}, not {wanted!r}")
        figures.failures += [f"seed {seed}: {complaint}" for complaint in gateway.complaints()]
        half = [_connect(gateway) for _ in range(20)]
        for client in half:
            _half_body(client, chance)
        code, seconds = gateway.stop()
        for client in half:
            client.close()
        figures.add("SIGTERM amid 20 half requests")
        if code != 0 or seconds > _STOPPED_S:
            figures.failures.append(f"seed {seed}: after SIGTERM it ended with {code} in {seconds:.0f} s")
    return figures


def _connect(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(gateway.address, timeout=10)


def _request(chance: random.Random, stream: bool = False, path: str = CHAT) -> bytes:
    text = wrap(f"value_{chance.randrange(100)} = {chance.randrange(100)}")
    body = json.dumps(chat_body(f"{text} Say it.", max_tokens=chance.choice([1, 64]), stream=stream)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# Each sends something; True: it stays connected and says no more.


def _nothing(client: socket.socket, chance: random.Random) -> bool:
    return chance.random() < 0.5


def _half_head(client: socket.socket, chance: random.Random) -> bool:
    client.sendall(_request(chance)[: chance.randint(1, 80)])
    return chance.random() < 0.5


def _half_body(client: socket.socket, chance: random.Random) -> bool:
    client.sendall(_request(chance)[:-5])
    return chance.random() < 0.5


def _leaves_before_the_answer(client: socket.socket, chance: random.Random) -> bool:
    client.sendall(_request(chance, stream=chance.random() < 0.5))
    if chance.random() < 0.5:
        _reset(client)
    return False


def _leaves_within_the_answer(client: socket.socket, chance: random.Random) -> bool:
    client.sendall(_request(chance, stream=True))
    client.recv(chance.choice([1, 100, 1000]))
    _reset(client)
    return False


def _does_not_read(client: socket.socket, chance: random.Random) -> bool:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.sendall(_request(chance, stream=True))
    return True


def _many_at_once(client: socket.socket, chance: random.Random) -> bool:
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * chance.randint(2, 200))
    return False


def _no_http(client: socket.socket, chance: random.Random) -> bool:
    client.sendall(
        chance.choice([
            chance.randbytes(chance.randint(1, 2000)), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 500, b"GET " + b"/x" * 40_000,
            b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000,
            b"POST /v1/memories HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/memories HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n",
        ])
    )  # fmt: skip
    return chance.random() < 0.2


def _declares_more(client: socket.socket, chance: random.Random) -> bool:
    head, _, body = _request(chance).partition(b"\r\n\r\n")
    client.sendall(head.replace(b"Content-Length: ", b"Content-Length: 9") + b"\r\n\r\n" + body)
    return chance.random() < 0.5


CLIENTS: dict[str, Callable[[socket.socket, random.Random], bool]] = {
    "silent": _nothing,
    "half a head": _half_head,
    "half a body": _half_body,
    "gone before the answer": _leaves_before_the_answer,
    "gone within the answer": _leaves_within_the_answer,
    "does not read": _does_not_read,
    "many at once": _many_at_once,
    "no HTTP": _no_http,
    "declares more than it sends": _declares_more,
}
