"""Bodies are read whole and unchanged, or refused by name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("orjson")

from utils.serving.api_error import ApiError, shown
from utils.serving.json_body import MAX_DEPTH, MAX_VALUES, read_object

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"', "\\", '\\"', "{[,:]}", '"\\\\"'])
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=8,
)


@settings(max_examples=25)
@given(body=st.dictionaries(TEXTS, VALUES), ascii_only=st.booleans())
def test_every_object_is_read(body: dict[str, Any], ascii_only: bool) -> None:
    assert read_object(json.dumps(body, ensure_ascii=ascii_only, indent=1).encode()) == body


def test_numbers_of_any_length_are_read() -> None:
    text = '{"a":0.12345678901234567890123,"b":1e20,"c":100000000000000000000.5,"d":18446744073709551615,"e":1e-12}'
    assert read_object(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"text":"\\ud800"}', "surrogate"),
        (b'{"seed":1e999}', "infinity"),
        (b'{"seed":NaN}', "not JSON"),
        (b'{"seed":18446744073709551616}', "18446744073709551616"),
        (b'{"seed":-9223372036854775809}', "-9223372036854775809"),
        (b'{"a":1,"prompt":"x","prompt":"y"}', "'prompt'"),
        (b'{"a":[{"type":"text","b":{},"type":"x"}]}', "'type'"),
        (b'{"a\\"b":1,"a\\"b":2}', "twice"),
        (b'{"text":"\xff"}', "UTF-8"),
        (b"", "not JSON"),
        (b"[{}]", "list"),
        (b'"x"', "str"),
        (b'{"text":"x', "not JSON"),
    ],
)
def test_what_is_refused(raw: bytes, named: str) -> None:
    with pytest.raises(ApiError, match=named) as error:
        read_object(raw)
    assert error.value.status == 400


@pytest.mark.parametrize("depth", [MAX_DEPTH, 300, 2000, 100_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_deep_fields_are_named(depth: int, pair: str) -> None:
    opening = pair[0] + ('"k":' if pair == "{}" else "")
    nest = opening * (depth - 1) + pair + pair[1] * (depth - 1)
    raw = f'{{"first": ["]"], "to o\\"ls" : {nest}, "last": {{}}}}'.encode()
    with pytest.raises(ApiError, match=rf"ls is nested .*{MAX_DEPTH} levels") as error:
        read_object(raw)
    assert error.value.status == 400
    assert len(str(error.value)) < 200


def test_brackets_in_strings_are_no_nesting() -> None:
    body = {"a": "[" * 1000, "b": '\\"' + "{" * 1000, "c": [[]] * 1000}
    assert read_object(json.dumps(body).encode()) == body


@pytest.mark.parametrize("raw", [b'{"a":[' + b"{}," * MAX_VALUES + b"{}]}", b'{"a":[' + b"1," * MAX_VALUES + b"1]}"])
def test_too_many_values_are_refused_before_they_are_made(raw: bytes) -> None:
    began = time.process_time()
    with pytest.raises(ApiError, match=str(MAX_VALUES)) as error:
        read_object(raw)
    assert error.value.status == 413
    assert time.process_time() - began < 1


def test_shown_values_are_short() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, {"a": deep}, "x" * 1_000_000, ["x"] * 1_000_000, 10**300, None):
        assert len(shown(value)) < 80
    while deep:
        deep = deep.pop()
    assert (shown(7), shown("x"), shown(["a", "b"])) == ("7", "'x'", "a list of 2")
