"""Prompt embeddings on disk and on the wire."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import resource
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from utils.compress.prompt_embeds import (
    CompressionStats,
    PromptEmbeds,
    encode_wire,
    load_prompt_embeds,
    save_prompt_embeds,
    sidecar_path,
)
from utils.errors import ConfigError, DatasetError
from utils.files import read_json

STATS = CompressionStats(memory_tokens=12, num_latents=3, prompt_tokens=7, cached_tokens=4)


def make_embeds(dtype: torch.dtype = torch.float32) -> PromptEmbeds:
    values_TD = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    return PromptEmbeds(values_TD=values_TD, spans=((2, 4), (4, 5)), stats=STATS, provenance={"chunk_size": 4})


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_comes_back(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    embeds = make_embeds(dtype)
    path = tmp_path / f"rows.{suffix}"
    save_prompt_embeds(path, embeds)
    loaded = load_prompt_embeds(path)
    assert loaded.values_TD.dtype == dtype
    assert torch.equal(loaded.values_TD, embeds.values_TD)
    assert (loaded.spans, loaded.stats, loaded.provenance) == (embeds.spans, embeds.stats, embeds.provenance)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.json", f"rows.{suffix}"]


def test_npy_is_float32_in_c_order_for_any_reader(tmp_path: Path) -> None:
    values_TD = make_embeds(torch.bfloat16).values_TD.T.contiguous().T  # a transposed view
    save_prompt_embeds(tmp_path / "rows.npy", PromptEmbeds(values_TD=values_TD, spans=(), stats=STATS))
    array = np.load(tmp_path / "rows.npy", allow_pickle=False)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert np.array_equal(array, values_TD.float().numpy())


def test_sidecar_reports_spans_counts_and_ratio(tmp_path: Path) -> None:
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds(torch.bfloat16))
    sidecar = json.loads((tmp_path / "rows.json").read_text())
    assert sidecar["spans"] == [[2, 4], [4, 5]]
    assert sidecar["stats"]["ratio"] == 4.0
    assert sidecar["array"]["shape"] == [7, 5]
    assert sidecar["array"]["dtype"] == "bfloat16"


def test_bare_array_is_a_valid_input(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.asfortranarray(np.ones((3, 2), np.float32)))
    loaded = load_prompt_embeds(tmp_path / "rows.npy")
    assert loaded.spans == ()
    assert loaded.stats.prompt_tokens == 3
    assert loaded.values_TD.is_contiguous()


def test_sidecar_of_another_array_is_refused(tmp_path: Path) -> None:
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds())
    np.save(tmp_path / "rows.npy", np.ones((7, 5), np.float32))
    with pytest.raises(DatasetError, match=r"rows\.json describes another array"):
        load_prompt_embeds(tmp_path / "rows.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a sidecar"),
        ('{"version": 1}', "not a sidecar"),
        ("not json", "is not JSON"),
    ],
)
def test_broken_sidecar_is_named(tmp_path: Path, content: str, message: str) -> None:
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds())
    sidecar_path(tmp_path / "rows.npy").write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_prompt_embeds(tmp_path / "rows.npy")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.ones(2, 2), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_npy(np.ones(4, np.float32)), r"expected a matrix \[rows, width\], got shape \[4\]"),
        (_npy(np.ones((0, 4), np.float32)), "expected a matrix"),
        (_npy(np.array([[0, 1], [np.nan, 0], [np.inf, 0]], np.float32)), "2 of 3 rows hold NaN or infinity, the first"),
        (_npy(np.ones((2, 2))), "holds float64, expected float32"),
        (_npy(np.ones((2, 2), ">f4")), "holds >f4"),
        (_npy(np.ones((2, 2), np.int64)), "holds int64"),
        (_npy(np.array([["a", {}]], object)), "not a readable"),
        (_npy(np.ones((2, 2), np.float32))[:-1], "not a readable"),
        (pickle.dumps([1]), "is a pickle"),
        (_torch_file(), "is a pickle or a torch.save file"),
        (b"", "not a readable"),
        (b"hello, this is text", "not a readable"),
    ],
)
def test_bad_file_is_refused_and_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.npy"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=message) as caught:
        load_prompt_embeds(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_foreign_tensor_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(DatasetError, match="does not exist"):
        load_prompt_embeds(tmp_path / "none.npy")
    save_file({"other": torch.ones(2, 2)}, tmp_path / "rows.safetensors")
    with pytest.raises(DatasetError, match=r"'prompt_embeds'.*'other'"):
        load_prompt_embeds(tmp_path / "rows.safetensors")


def test_bad_values_write_nothing(tmp_path: Path) -> None:
    bad = PromptEmbeds(values_TD=torch.full((2, 2), torch.nan), spans=(), stats=STATS)
    with pytest.raises(DatasetError, match="NaN"):
        save_prompt_embeds(tmp_path / "rows.npy", bad)
    outside = PromptEmbeds(values_TD=torch.ones(2, 2), spans=((1, 3),), stats=STATS)
    with pytest.raises(DatasetError, match="span 0 is rows 1 to 3 of 2"):
        save_prompt_embeds(tmp_path / "rows.npy", outside)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"rows \xff.npy")
    save_prompt_embeds(path, make_embeds())
    assert load_prompt_embeds(path).spans == make_embeds().spans
    assert read_json(sidecar_path(path))["array"]["file"] == path.name


def test_an_array_never_appears_without_its_sidecar(tmp_path: Path) -> None:
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    large = replace(make_embeds(), values_TD=torch.ones(7, 5), provenance={"note": "x" * 100_000})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_prompt_embeds(tmp_path / "rows.npy", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_format_and_name_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the name says npy"):
        save_prompt_embeds(tmp_path / "rows.npy", make_embeds(), format="safetensors")
    with pytest.raises(ConfigError, match="no format in the name"):
        save_prompt_embeds(tmp_path / "rows", make_embeds())
    save_prompt_embeds(tmp_path / "rows", make_embeds(), format="npy")
    assert load_prompt_embeds(tmp_path / "rows").spans == ((2, 4), (4, 5))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_wire_blob_is_a_safe_torch_file_of_the_rows_alone(dtype: torch.dtype | None) -> None:
    pytest.importorskip("pybase64")
    whole = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    blob = encode_wire(whole[10:13].requires_grad_(), dtype)
    data = base64.b64decode(blob, validate=True)
    tensor = torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(tensor, whole[10:13].to(dtype or torch.float32))
    assert tensor.is_contiguous()
    assert len(data) < 4000, "the neighbours' rows travelled too"


@pytest.mark.parametrize("values", [torch.ones(3), torch.full((1, 2), torch.inf), torch.ones(2, 2, dtype=torch.int64)])
def test_wire_refuses_what_a_server_would(values: torch.Tensor) -> None:
    pytest.importorskip("pybase64")
    with pytest.raises(DatasetError):
        encode_wire(values)


def test_wire_refuses_values_that_overflow_the_servers_dtype() -> None:
    pytest.importorskip("pybase64")
    with pytest.raises(DatasetError, match="infinity"):
        encode_wire(torch.full((1, 2), 1e6), torch.float16)


def test_a_sidecar_replaces_sidecars_only(tmp_path: Path) -> None:
    messages = tmp_path / "messages.json"
    for content in ('[{"role": "user", "content": "x"}]', '{"version": 1}', "not JSON"):
        messages.write_text(content)
        with pytest.raises(ConfigError, match=r"messages\.json is in the way"):
            save_prompt_embeds(tmp_path / "messages.npy", make_embeds())
        assert messages.read_text() == content
        assert not (tmp_path / "messages.npy").exists()
    with pytest.raises(ConfigError, match=r"rows\.json: the sidecar takes the name"):
        save_prompt_embeds(tmp_path / "rows.json", make_embeds(), format="npy")
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds())
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds(torch.bfloat16))
    assert load_prompt_embeds(tmp_path / "rows.npy").values_TD.dtype == torch.bfloat16


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (8000000, 1000)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387905, 4)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ", 4)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -4)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, -4)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4.0)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': [2, 4]}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': ()}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 8000 + "1,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 5000 + "1" + ")" * 5000 + "}",
    "{'descr': '<f4', 'fortran_order': 2, 'shape': (2, 4)}",
    "{'descr': '>f4', 'fortran_order': False, 'shape': (2, 4)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4)}",
    "{'descr': [('a', '<f4'), ('ü', '<f4')], 'fortran_order': False, 'shape': (2, 2)}",
    "{'descr': '" + "<f4" * 3000 + "', 'fortran_order': False, 'shape': (2, 4)}",
    "{'descr': {}, 'fortran_order': False, 'shape': (2, 4)}",
    "{'descr': '<f4', 'shape': (2, 4)}",
    "{1: 2}",
    "[]",
    "not a header \0 \\x",
]


def npy_with(header: str, version: int) -> bytes:
    text = header.encode("utf-8" if version == 3 else "latin1") + b"\n"
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + np.ones(8, "<f4").tobytes()


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_a_header_that_lies_is_one_error(tmp_path: Path, number: int) -> None:
    header, version = HEADERS[number], 1 + number % 3
    path = tmp_path / "rows.npy"
    path.write_bytes(npy_with(header, version))
    with pytest.raises(DatasetError) as caught:
        load_prompt_embeds(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("fortran", [False, True])
def test_every_version_of_a_true_header_is_read(tmp_path: Path, version: int, fortran: bool) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': (2, 4)}}"
    (tmp_path / "rows.npy").write_bytes(npy_with(header, version))
    values_TD = load_prompt_embeds(tmp_path / "rows.npy").values_TD
    assert values_TD.is_contiguous()
    assert torch.equal(values_TD, torch.ones(2, 4))


def safetensors_with(header: str, length: int | None = None) -> bytes:
    return (len(header.encode()) if length is None else length).to_bytes(8, "little") + header.encode() + bytes(32)


def tensor(**changes: object) -> str:
    return json.dumps({"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32], **changes})


@pytest.mark.parametrize(
    "data",
    [
        safetensors_with("{}", 1 << 62),
        safetensors_with("{}", 200),
        safetensors_with("{}", 0),
        safetensors_with("[" * 10_000),
        safetensors_with("{}"),
        *(
            safetensors_with('{"prompt_embeds": ' + tensor(**changes) + "}")
            for changes in (
                {"shape": [1 << 40, 1 << 40]},
                {"shape": [-2, 4]},
                {"shape": [2, 5]},
                {"shape": [True, 8]},
                {"shape": None},
                {"data_offsets": [0, 64]},
                {"data_offsets": [32, 0]},
                {"data_offsets": [0, 1 << 62]},
                {"data_offsets": [0, 16]},
                {"dtype": "F99"},
                {"dtype": "I32"},
                {"dtype": ["F32"]},
            )
        ),
    ],
)
def test_a_safetensors_header_that_lies_is_one_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.safetensors"
    path.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        load_prompt_embeds(path)
    assert str(path) in str(caught.value)


WRONG = [None, True, -1, 1.5, 1e400, "x", [], {}, [[]], [[0]], [[0, 1, 2]], [[True, 2]], [["0", "1"]], [[0, 1e400]]]
PLACES = [
    (), ("version",), ("array",), ("array", "sha256"), ("array", "dtype"), ("spans",), ("stats",),
    ("stats", "memory_tokens"), ("stats", "unknown"), ("provenance",),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_sidecar_with_a_wrong_value_anywhere_is_one_error(tmp_path: Path, place: tuple[str, ...]) -> None:
    path = tmp_path / "rows.npy"
    save_prompt_embeds(path, make_embeds())
    whole = sidecar_path(path).read_text()
    for wrong in [*WRONG, [[0, 10**4000]]]:
        sidecar = {"root": json.loads(whole)}
        parent = sidecar
        for key in ("root", *place)[:-1]:
            parent = parent[key]
        parent[("root", *place)[-1]] = wrong
        sidecar_path(path).write_text(json.dumps(sidecar["root"]))
        if (place, wrong) in [(("spans",), []), (("provenance",), {})]:
            load_prompt_embeds(path)
            continue
        with pytest.raises(DatasetError) as caught:
            load_prompt_embeds(path)
        assert "rows" in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}", "", "\0"])
def test_a_sidecar_that_no_reader_takes_is_one_error(tmp_path: Path, text: str) -> None:
    save_prompt_embeds(tmp_path / "rows.npy", make_embeds())
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DatasetError, match=r"rows\.json"):
        load_prompt_embeds(tmp_path / "rows.npy")


def test_a_sidecars_dtype_that_cannot_hold_the_values_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    save_prompt_embeds(path, PromptEmbeds(values_TD=torch.full((1, 2), 1e6), spans=(), stats=STATS))
    sidecar_path(path).write_text(sidecar_path(path).read_text().replace("float32", "float16"))
    with pytest.raises(DatasetError, match="infinity"):
        load_prompt_embeds(path)


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_garbage_is_an_error_or_an_array(tmp_path: Path, suffix: str) -> None:
    path, random = tmp_path / f"rows.{suffix}", Random(0)
    save_prompt_embeds(path, make_embeds())
    sidecar_path(path).unlink()
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(random.choice([1, 1, 3])):
            place = random.randrange(len(data))
            data[place : place + random.choice([0, 1, 5])] = random.randbytes(random.choice([0, 1, 3]))
        path.write_bytes(data)
        try:
            loaded = load_prompt_embeds(path).values_TD
        except DatasetError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right
        else:
            assert loaded.nbytes <= len(data)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    for path in (tmp_path / "pipe.npy", tmp_path):
        with pytest.raises(DatasetError, match="no file"):
            load_prompt_embeds(path)


def test_a_pipe_gets_the_array_without_a_sidecar(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.npy"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_prompt_embeds(pipe, make_embeds())
    array = np.load(io.BytesIO(os.read(reader, 65536)))
    os.close(reader)
    assert np.array_equal(array, make_embeds().values_TD.numpy())
    assert [file.name for file in tmp_path.iterdir()] == ["rows.npy"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_is_no_output(name: str) -> None:
    with pytest.raises(ConfigError, match="folder"):
        save_prompt_embeds(name, make_embeds(), format="npy")
