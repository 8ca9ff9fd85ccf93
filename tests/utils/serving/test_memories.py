"""Stored texts belong to who stored them, expire, and make room for newer ones of the same owner."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("orjson")

from utils.serving.api_error import ApiError
from utils.serving.memories import MemoryStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def names(store: MemoryStore, owner: str = "") -> list[str]:
    return [memory.text for memory in store.list(owner)]


def test_a_foreign_text_is_one_that_does_not_exist() -> None:
    store = MemoryStore(10, 1000, num_owners=2)
    mine = store.add("mine", "a").id
    unknown = "mem-" + "0" * 32
    said = []
    for memory_id in (mine, unknown):
        for act in (store.get, store.delete, lambda name, owner: store.resolve(f" @{name}\n", owner)):
            with pytest.raises(ApiError) as error:
                act(memory_id, "b")
            assert error.value.status == 404
            said.append(str(error.value).replace(memory_id, "ID"))
    assert len(set(said)) == 1
    assert (names(store, "a"), names(store, "b")) == (["mine"], [])
    found = store.resolve(f" @{mine}\n", "a")
    assert found is not None
    assert found.text == "mine"
    assert store.resolve("@mem-x", "a") is None
    store.delete(mine, "a")
    assert names(store, "a") == []


def test_texts_expire_after_their_last_use() -> None:
    clock = Clock()
    store = MemoryStore(10, 1000, ttl_s=60, clock=clock)
    kept, left = store.add("kept"), store.add("left")
    assert kept.summary()["expires"] == 1060
    clock.now += 59
    assert store.get(kept.id).summary()["expires"] == 1119
    clock.now += 1
    assert names(store) == ["kept"]
    with pytest.raises(ApiError, match=left.id):
        store.get(left.id)
    clock.now += 60
    assert names(store) == []


def test_the_least_recently_used_make_room() -> None:
    store = MemoryStore(3, 100)
    ids = [store.add(text).id for text in "abc"]
    store.get(ids[0])
    store.add("d")
    assert names(store) == ["c", "a", "d"]
    store.add("x" * 99)
    assert names(store) == ["d", "x" * 99]
    with pytest.raises(ApiError, match=r"101 bytes.* 100") as error:
        store.add("é" * 50 + "x")
    assert error.value.status == 413
    assert len(names(store)) == 2


def test_no_owner_takes_anothers_room() -> None:
    store = MemoryStore(4, 200, num_owners=2)
    store.add("x" * 100, "a")
    for number in range(50):
        store.add(f"{number}", "b")
    assert names(store, "a") == ["x" * 100]
    assert names(store, "b") == ["48", "49"]
    with pytest.raises(ApiError, match=r"101 bytes.* 100"):
        store.add("x" * 101, "b")
    store.add("y" * 100, "b")
    assert (names(store, "a"), names(store, "b")) == (["x" * 100], ["y" * 100])
