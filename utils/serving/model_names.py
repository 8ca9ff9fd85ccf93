"""Compression by the model's name, for clients that send no fields of their own: `NAME@8x`, `NAME@16x+expand`.

    split_name("tiny@16x+expand", [8, 16])      # ("tiny", {"chunk_size": 16, "expand": "1/16"})
    with_variants([{"id": "tiny"}], [8, 16])    # tiny, tiny@8x, tiny@8x+expand, …

`@16x` is latents at chunk size 16; with `+expand` as many rows again are text that the question selects.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from utils.serving.api_error import ApiError, shown
from utils.serving.request_options import EXTENSION

_NAME = re.compile(r"(.+)@([1-9][0-9]{0,4})x(\+expand)?", re.DOTALL)


def split_name(model: Any, chunk_sizes: Collection[int]) -> tuple[str, dict[str, Any]] | None:
    """The backend's own name of a model, and what the name asks of the gateway; None where it asks nothing."""
    match = _NAME.fullmatch(model) if isinstance(model, str) else None
    if match is None or (size := int(match[2])) not in chunk_sizes:
        return None
    return match[1], _asked(size, bool(match[3]))


def read_name(body: dict[str, Any], chunk_sizes: Collection[int]) -> dict[str, Any]:
    """A body whose model is the backend's, and whose options say what the name said; the same if it says nothing.

    What the body says about expansion itself goes before what the name says.

    Raises:
        ApiError: 400, name and body ask for different chunk sizes.
    """
    named = split_name(body.get("model"), chunk_sizes)
    own = body.get(EXTENSION)
    if named is None or not isinstance(own, Mapping | None):
        return body
    name, asked = named
    said = {field: value for field, value in (own or {}).items() if value is not None}
    if said.get("chunk_size", asked["chunk_size"]) != asked["chunk_size"]:
        raise ApiError(
            400, f"the model {shown(body['model'])} has chunk size {asked['chunk_size']}, {EXTENSION} asks for "
            f"{shown(said['chunk_size'])}: expected one of them",
        )  # fmt: skip
    if any(field.startswith("expand") for field in said):
        asked.pop("expand", None)
    return {**body, "model": name, EXTENSION: {**asked, **said}}


def with_variants(entries: Iterable[dict[str, Any]], chunk_sizes: Iterable[int]) -> list[dict[str, Any]]:
    """Entries of a list of models, each followed by its variants, which say under `code_llava` what they ask for."""
    variants = [
        (f"@{size}x{'+expand' if expands else ''}", _asked(size, expands))
        for size in chunk_sizes
        for expands in (False, True)
    ]
    listed = []
    for entry in entries:
        listed.append(entry)
        for ending, asked in variants:
            listed.append({**entry, "id": entry["id"] + ending, "parent": entry["id"], EXTENSION: asked})
    return listed


def _asked(size: int, expands: bool) -> dict[str, Any]:
    return {"chunk_size": size} | ({"expand": f"1/{size}"} if expands else {})
