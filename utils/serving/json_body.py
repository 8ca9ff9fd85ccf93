"""A request's bytes → its JSON object, with bounds on depth and number of values, and nothing changed silently.

    body = read_object(raw)           # ApiError 400 or 413 that names the field

A parser builds objects of many times a body's bytes, holds Python's lock meanwhile, keeps the last of two equal names
and rounds long numbers. So the body's skeleton, what stands outside its strings, is counted first: numpy does that fast
and lets the lock go.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import orjson

from utils.serving.api_error import ApiError, shown

# Deeper than any schema; well below where writers of JSON and `repr` give up.
MAX_DEPTH = 128
# A million dictionaries are a second of parsing and some hundred megabytes.
MAX_VALUES = 1 << 20

_PIECE = 1 << 20
_LONG_NUMBER = re.compile(rb"(?<![0-9.eE+-])-?[0-9]{19,}(?![0-9.eE])")
_NAME_BEFORE = re.compile(rb'"([^"]*)"\s*$')


def read_object(raw: bytes) -> dict[str, Any]:
    """Parse a body.

    Raises:
        ApiError: 400, it is not JSON, not an object, nested too deep, names a field twice, or holds a whole number
            of more than 64 bits; 413, it has more values than a body may have.
    """
    # Left to right, so that an escaped backslash does not escape the quote behind it.
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    codes = np.frombuffer(unescaped, np.uint8)
    outside = _outside_strings(codes)
    skeleton = codes[outside].tobytes()
    num_open = skeleton.count(b"[") + skeleton.count(b"{")
    num_values = skeleton.count(b",") + num_open
    if num_values > MAX_VALUES:
        raise ApiError(413, f"the body holds about {num_values} JSON values, the limit is {MAX_VALUES}")
    if num_open > MAX_DEPTH:
        _check_depth(unescaped, skeleton, outside)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}")
    num_names, has_huge_number = _walk(value)
    if skeleton.count(b":") != num_names:
        # Another reader may take the first: what is checked here and what the backend reads would differ.
        raise ApiError(400, f"an object in the body has the field {_repeated_name(raw)} twice")
    for match in _LONG_NUMBER.finditer(skeleton) if has_huge_number else ():
        number = match[0].decode()
        if len(number) > 20 or not -(1 << 63) <= int(number) < 1 << 64:
            raise ApiError(400, f"the body holds a whole number of more than 64 bits: {shown(number)}")
    return value


def _outside_strings(codes: np.ndarray) -> np.ndarray:
    """Mask of a body without escapes: False from each opening quote to the character before the closing one."""
    outside = np.empty(len(codes), bool)
    odd = np.uint8(0)
    for at in range(0, len(codes), _PIECE):
        # The count of quotes so far; it may wrap, its last bit is what matters.
        count = np.add.accumulate(codes[at : at + _PIECE] == ord('"'), dtype=np.uint8)
        count += odd
        outside[at : at + _PIECE] = (count & 1) == 0
        odd = count[-1] & 1
    return outside


def _check_depth(unescaped: bytes, skeleton: bytes, outside: np.ndarray) -> None:
    codes = np.frombuffer(skeleton, np.uint8)
    opened = (codes == ord("[")) | (codes == ord("{"))
    closed = (codes == ord("]")) | (codes == ord("}"))
    depth = np.add.accumulate(opened.astype(np.int32) - closed)
    deep = int(np.argmax(depth > MAX_DEPTH))
    if depth[deep] <= MAX_DEPTH:
        return
    # The field is the one whose colon is the last at depth 1.
    colons = np.flatnonzero((codes[:deep] == ord(":")) & (depth[:deep] == 1))
    name = b""
    if len(colons):
        at = int(np.flatnonzero(outside)[colons[-1]])
        found = _NAME_BEFORE.search(unescaped[max(0, at - 200) : at])
        name = found[1] if found else b""
    raise ApiError(
        400, f"{name.decode(errors='replace')[:60] or 'the body'} is nested deeper than the limit of {MAX_DEPTH} levels"
    )


def _walk(value: dict[str, Any]) -> tuple[int, bool]:
    """The number of names in all objects, and whether there is a number that 64 bits cannot hold."""
    num_names, has_huge_number = 0, False
    waiting: list[Any] = [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict):
            num_names += len(container)
            container = container.values()
        for inner in container:
            if isinstance(inner, dict | list):
                waiting.append(inner)
            elif type(inner) is float and abs(inner) >= 1 << 63:
                has_huge_number = True
    return num_names, has_huge_number


def _repeated_name(raw: bytes) -> str:
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        found.extend(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]

    json.loads(raw, object_pairs_hook=note)
    return shown(found[0]) if found else "of some name"
