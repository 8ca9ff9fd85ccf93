"""What a model's name asks for, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("orjson")

from utils.serving.model_names import read_name, split_name, with_variants


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("tiny@8x", ("tiny", {"chunk_size": 8})),
        ("org/tiny@16x+expand", ("org/tiny", {"chunk_size": 16, "expand": "1/16"})),
        ("a@4x@8x", ("a@4x", {"chunk_size": 8})),
        ("tiny", None),
        ("tiny@4x", None),  # a size that the checkpoint does not have: the backend will say that it has no such model
        ("tiny@08x", None),
        ("@8x", None),
        ("tiny@8x+", None),
        (None, None),
        (8, None),
    ],
)
def test_split_name(name: Any, split: Any) -> None:
    assert split_name(name, [8, 16]) == split


def test_a_body_that_asks_nothing_is_left_alone() -> None:
    for body in ({"model": "tiny"}, {}, {"model": "tiny@8x", "code_llava": 5}):
        assert read_name(body, [8]) is body
    assert read_name({"model": "tiny@8x"}, []) == {"model": "tiny@8x"}
    read = read_name(
        {"model": "tiny@8x+expand", "n": 1, "code_llava": {"expand_policy": "all", "chunk_size": None}}, [8]
    )
    assert read == {"model": "tiny", "n": 1, "code_llava": {"chunk_size": 8, "expand_policy": "all"}}


def test_variants_follow_their_model() -> None:
    entries = with_variants([{"id": "a", "owned_by": "x"}, {"id": "b"}], [8])
    assert [entry["id"] for entry in entries] == ["a", "a@8x", "a@8x+expand", "b", "b@8x", "b@8x+expand"]
    assert entries[2] == {
        "id": "a@8x+expand",
        "owned_by": "x",
        "parent": "a",
        "code_llava": {"chunk_size": 8, "expand": "1/8"},
    }
