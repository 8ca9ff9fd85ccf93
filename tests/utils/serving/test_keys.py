"""Several keys: each has its own memories, cache entries and salt; without keys all clients are one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import httpx
import pytest

from tests.support import fake_server, gateway_server, local_gateway, prompts
from tests.support.fake_server import FakeServer
from tests.support.prompts import CHAT, COMPLETIONS
from utils.compress.compressor import Compressor
from utils.errors import ConfigError
from utils.model.markers import wrap
from utils.serving.settings import GatewaySettings, read_keys

KEYS = ("alice's", "bob's", "é")

chat_body = functools.partial(prompts.chat_body, max_tokens=1)


@pytest.fixture(scope="module")
def clients(compressor: Compressor, server: FakeServer) -> Iterator[list[httpx.Client]]:
    """One client a key."""
    with gateway_server.running(compressor, server.url, api_keys=KEYS) as url:
        made = [client(url, key) for key in KEYS]
        yield made
        for each in made:
            each.close()


JSON_TYPE = {"Content-Type": "application/json"}


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={b"Authorization": f"Bearer {key}".rstrip().encode()}, timeout=20)


def cached_tokens(who: httpx.Client, text: str) -> int:
    return int(who.post(CHAT, json=chat_body(wrap(text))).raise_for_status().json()["code_llava"]["cached_tokens"])


def test_every_key_enters_and_no_other(clients: list[httpx.Client]) -> None:
    url = str(clients[0].base_url)
    for each in clients:
        assert each.post(CHAT, json=chat_body("x")).status_code == 200
    for wrong in ("alice", "alice's,bob's", "bob'sé"):
        with client(url, wrong) as other:
            assert other.post(CHAT, json=chat_body("x")).status_code == 401
    assert httpx.post(url + CHAT, json=chat_body("x")).status_code == 401


def test_memories_are_their_owners(clients: list[httpx.Client]) -> None:
    alice, bob, _ = clients
    name = alice.post("/v1/memories", json={"text": "the password is tiger"}).json()["id"]
    unknown = "mem-" + "0" * 32
    assert bob.get("/v1/memories").json()["data"] == []
    for ask in (
        lambda memory: bob.post(CHAT, json=chat_body(wrap("@" + memory))),
        lambda memory: bob.post(COMPLETIONS, json={"prompt": wrap("@" + memory)}),
        lambda memory: bob.delete(f"/v1/memories/{memory}"),
    ):
        foreign, missing = ask(name), ask(unknown)
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace(name, unknown) == missing.text
    (summary,) = alice.get("/v1/memories").json()["data"]
    assert summary["expires"] > summary["created"]
    assert alice.post(CHAT, json=chat_body(wrap("@" + name))).status_code == 200
    assert alice.delete(f"/v1/memories/{name}").status_code == 200


def test_cached_tokens_tell_only_what_the_same_key_sent(clients: list[httpx.Client], compressor: Compressor) -> None:
    alice, bob, _ = clients
    secret = "a secret of alice's\n" * 9
    assert cached_tokens(alice, secret) == 0
    assert cached_tokens(bob, secret) == 0
    assert cached_tokens(alice, secret) == cached_tokens(bob, secret) == len(secret)
    shared = "what the operator has encoded\n" * 9
    compressor.encode_spans(compressor.parse_raw(wrap(shared)).spans)
    assert cached_tokens(bob, shared) == len(shared)


def test_salts_keep_the_servers_prefix_cache_apart(clients: list[httpx.Client], backend: FakeServer) -> None:
    bodies = [chat_body(text, **salt) for text in ("plain", wrap("x")) for salt in ({}, {"cache_salt": "mine"})]
    for each in (*clients[:2], clients[0]):
        for body in bodies:
            assert each.post(CHAT, json=body).status_code == 200
    salts = [body["cache_salt"] for _, body in backend.requests]
    alice, bob, again = salts[:4], salts[4:8], salts[8:]
    assert alice == again
    assert alice[:2] == alice[2:]
    assert len({*alice, *bob}) == 4
    assert "mine" not in salts
    assert not any(key in salt for salt in salts for key in KEYS)
    assert clients[0].post(CHAT, json=chat_body("x", cache_salt=5)).status_code == 400


def test_a_client_cannot_send_anothers_salt(clients: list[httpx.Client], backend: FakeServer) -> None:
    alice, bob, _ = clients
    alice.post(CHAT, json=chat_body("x"))
    salt = backend.requests[-1][1]["cache_salt"]
    bob.post(CHAT, json=chat_body("x", cache_salt=salt))
    assert backend.requests[-1][1]["cache_salt"] != salt


def test_without_keys_bodies_pass_byte_for_byte(compressor: Compressor, backend: FakeServer) -> None:
    seen: list[bytes] = []
    backend.default_action = lambda handler: (seen.append(handler.body), fake_server.answer("fine")(handler))[0]
    raw = b'{ "messages": [ {"role":"user","content":"x"}],"cache_salt":"mine", "a" :1.0}'
    with gateway_server.running(compressor, backend.url) as url:
        assert httpx.post(url + CHAT, content=raw, headers=JSON_TYPE).status_code == 200
    assert seen == [raw]


def test_the_local_backend_has_no_use_for_salts(compressor: Compressor) -> None:
    with local_gateway.running(compressor, api_keys=KEYS) as url, client(url, KEYS[1]) as bob:
        assert bob.post(CHAT, json=chat_body(wrap("x"), cache_salt="mine")).status_code == 200


def test_reading_keys() -> None:
    assert read_keys(None, None, "KEY") == ()
    assert read_keys(None, "a, b,a", "KEY") == ("a", "b")
    assert read_keys(["a,b", "c"], "d", "KEY") == ("a,b", "c")
    for flags, variable in (([""], None), (["a", " "], None), ([","], None), (None, ""), (None, " , "), (None, "a,,b")):
        with pytest.raises(ConfigError, match="--api-key" if flags else r"\$KEY"):
            read_keys(flags, variable, "KEY")
    with pytest.raises(ConfigError, match="empty"):
        GatewaySettings(backend_url="x", api_keys=("a", ""))


@pytest.mark.parametrize("key", ["", " ", ","])
def test_an_empty_key_does_not_start_a_gateway(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from utils.serving.gateway import main

    assert main(["--api-key", key]) == 1
    assert "--api-key" in capsys.readouterr().err
    monkeypatch.setenv("CODE_LLAVA_GATEWAY_KEY", key)
    assert main([]) == 1
    assert "CODE_LLAVA_GATEWAY_KEY" in capsys.readouterr().err
