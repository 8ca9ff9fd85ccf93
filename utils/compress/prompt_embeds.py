"""Prompt embeddings as a value, as a file with its sidecar, and (for a server) as a wire blob.

    save_prompt_embeds("artifacts/prompt_embeddings.npy", embeds)   # + artifacts/prompt_embeddings.json
    embeds = load_prompt_embeds("artifacts/prompt_embeddings.npy")

Shape legend: T prompt rows, D decoder width. This module knows no model and no tokenizer.
"""

from __future__ import annotations

import contextlib
import io
import stat
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from utils.errors import ConfigError, DatasetError, first_line
from utils.files import atomic_path, is_stream, json_text, read_json, sha256_bytes, sha256_file

TENSOR_NAME = "prompt_embeds"
SIDECAR_VERSION = 1

_FORMAT_BY_SUFFIX = {".npy": "npy", ".safetensors": "safetensors"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NPY_MAGIC = b"\x93NUMPY"
_PICKLE_MAGICS = (b"\x80", b"PK\x03\x04")  # a bare pickle; the zip that torch.save (and np.savez) write


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionStats:
    """What a compression did, in counts.

    Attributes:
        memory_tokens: Encoder tokens inside the spans.
        num_latents: Latent rows that stand for them.
        prompt_tokens: Rows of the whole prompt, T.
        cached_tokens: Memory tokens whose latents came from the cache.
        text_rows: Rows of memory that stayed text, beside the latents.
    """

    memory_tokens: int
    num_latents: int
    prompt_tokens: int
    cached_tokens: int = 0
    text_rows: int = 0

    @property
    def ratio(self) -> float:
        """Compression ratio: memory tokens per row that stands for them, latent or text.

        That is LCLM's sense; kvpress uses the word for the part removed.
        """
        return compression_ratio(self.memory_tokens, self.num_latents + self.text_rows)


def compression_ratio(memory_tokens: int, num_rows: int) -> float:
    """Memory tokens per row of latents or text that stands for them; 1 without memory."""
    return memory_tokens / num_rows if num_rows else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedText:
    """A part of a span that stayed text.

    Attributes:
        span: The span's number.
        rows: Half-open range of the prompt's rows.
        chars: Half-open ranges of the span's characters.
    """

    span: int
    rows: tuple[int, int]
    chars: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmbeds:
    """The rows that a decoder reads in place of a prompt's token embeddings.

    Attributes:
        values_TD: Float tensor [T, D], on the CPU, in the checkpoint's dtype.
        spans: Half-open row ranges of the memory, markers excluded, in order: latents but for what stayed text.
        stats: Counts.
        expanded: What stayed text.
        provenance: Checkpoint fingerprint, chunk size, versions.
    """

    values_TD: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    stats: CompressionStats
    expanded: tuple[ExpandedText, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def sidecar_path(path: str | Path) -> Path:
    """Where the JSON that describes the array at `path` lies: the same name with the suffix `.json`."""
    path = Path(path)
    if path.name in ("", ".."):
        raise ConfigError(f"{path} is a folder: name a file in it")
    return path.with_suffix(".json")


def save_prompt_embeds(path: str | Path, embeds: PromptEmbeds, *, format: str | None = None) -> None:
    """Write an array file and its JSON sidecar, both or neither; into a pipe or device the array alone.

    The sidecar holds the array file's sha256, so that a reader can never take an old sidecar for a new array: what is
    killed between the two that it replaces leaves a pair that is refused.

    Args:
        path: The array file, for example `artifacts/prompt_embeddings.npy`.
        embeds: What to write: float32 in `npy` (NumPy has no bfloat16), the tensor's own dtype in `safetensors`.
        format: `npy` or `safetensors`; by the suffix of `path` without it.

    Raises:
        ConfigError: The format is unknown, the suffix promises the other one, or the sidecar would replace a file that
            is no sidecar.
        DatasetError: The values are not a finite float matrix, or a span lies outside it.
    """
    path = Path(path)
    format = _format_for(path, format)
    _check_sidecar_place(path)
    values_TD = _checked(embeds.values_TD.detach().cpu(), "the values to save")
    _check_spans(embeds.spans, len(values_TD), "the spans to save")
    if format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, values_TD.to(torch.float32).contiguous().numpy(), allow_pickle=False)
        data = buffer.getvalue()
    else:
        data = safetensors.torch.save({TENSOR_NAME: values_TD.contiguous()})
    sidecar = {
        "version": SIDECAR_VERSION,
        "array": {
            "file": path.name,
            "sha256": sha256_bytes(data),
            "shape": list(values_TD.shape),
            "dtype": _dtype_name(values_TD.dtype),
        },
        "spans": [list(span) for span in embeds.spans],
        "stats": {**asdict(embeds.stats), "ratio": embeds.stats.ratio},
        "provenance": embeds.provenance,
    }
    if embeds.expanded:
        sidecar["expanded"] = [asdict(text) for text in embeds.expanded]
    # Both are written before either is put in place: the sidecar first, so that no array is ever without it.
    with contextlib.ExitStack() as stack:
        stack.enter_context(atomic_path(path)).write_bytes(data)
        if not is_stream(path):
            text = json_text(sidecar, indent=2) + "\n"
            stack.enter_context(atomic_path(sidecar_path(path))).write_text(text, encoding="utf-8")


def load_prompt_embeds(path: str | Path) -> PromptEmbeds:
    """Read an array file and, where there is one, its sidecar.

    A bare array (`np.save` of a matrix) is a valid input: it has no spans and no provenance. Values come back in the
    dtype they had when they were saved; a float32 `.npy` of a bfloat16 checkpoint narrows without loss.

    Returns:
        Values [T, D], contiguous, on the CPU.

    Raises:
        DatasetError: The file is missing, a pickle, cut short, not a finite float16, bfloat16 or float32 matrix, or
            its sidecar describes another array.
    """
    path = Path(path)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist: write it with general/step1.py") from None
    if not regular:
        raise DatasetError(f"{path} is no file: name the .npy or .safetensors file itself")
    values_TD = _checked(_read(path), str(path))
    sidecar_file = sidecar_path(path)
    if not sidecar_file.exists():
        stats = CompressionStats(memory_tokens=0, num_latents=0, prompt_tokens=len(values_TD))
        return PromptEmbeds(values_TD=values_TD, spans=(), stats=stats)
    return _with_sidecar(values_TD, sha256_file(path), sidecar_file)


def encode_wire(values_TD: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Encode rows the way vLLM takes them: base64 of `torch.save` of one matrix.

    Args:
        values_TD: Float tensor [T, D] on any device; it is not changed.
        dtype: The server's dtype (servers before 0.26 demand it; later ones cast); the tensor's own without it.

    Raises:
        DatasetError: The values are not a finite float matrix.
    """
    import pybase64  # late: training and evaluating need no wire format

    # torch.save writes a tensor's whole storage: a slice must be copied first, or its neighbours travel too.
    owned_TD = values_TD.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
    _checked(owned_TD, "the values to send")
    buffer = io.BytesIO()
    torch.save(owned_TD, buffer)
    return pybase64.b64encode_as_string(buffer.getbuffer())


def _format_for(path: Path, format: str | None) -> str:
    by_suffix = _FORMAT_BY_SUFFIX.get(path.suffix)
    chosen = format or by_suffix
    if chosen is None or chosen not in _FORMAT_BY_SUFFIX.values():
        raise ConfigError(f"{path}: no format in the name and none given: end it with .npy or .safetensors")
    if by_suffix and by_suffix != chosen:
        raise ConfigError(f"{path}: the name says {by_suffix}, the format asked for is {chosen}: make them agree")
    return chosen


def _check_sidecar_place(path: Path) -> None:
    """Refuse to write a sidecar over a file that is none, for example the JSON file that held the prompt."""
    file = sidecar_path(path)
    if file == path:
        raise ConfigError(
            f"{path}: the sidecar takes the name with .json: end the array file with .npy or .safetensors"
        )
    if is_stream(path) or not file.exists():
        return
    try:
        if not file.is_file():
            raise DatasetError(f"{file} is no file")
        content = read_json(file)
    except DatasetError:
        content = None
    if not isinstance(content, dict) or not {"version", "array", "spans"} <= content.keys():
        raise ConfigError(f"{file} is in the way: the sidecar of {path} goes there and it is none; choose another name")


def _read(path: Path) -> torch.Tensor:
    """Read an array file's values; the content, not the name, tells the format.

    Both formats are mapped, so that a header is compared with the file's length before anything is allocated.
    """
    with path.open("rb") as stream:
        begin = stream.read(8)
    if begin.startswith(_PICKLE_MAGICS):
        raise DatasetError(
            f"{path} is a pickle or a torch.save file, which may run code: save it as .npy or .safetensors"
        )
    try:
        return _map_npy(path) if begin.startswith(_NPY_MAGIC) else _map_safetensors(path)
    except DatasetError:
        raise
    except Exception as error:  # a hostile header makes its parsers raise almost anything
        what = first_line(error)[:200]
        raise DatasetError(f"{path} is not a readable .npy or .safetensors file: {what}") from None


def _map_npy(path: Path) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # about a header that is then refused
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype not in (np.float32, np.float16):
        raise DatasetError(f"{path} holds {str(array.dtype)[:80]}, expected float32: save array.astype('float32')")
    expected, got = array.offset + array.nbytes, path.stat().st_size
    if array.size and expected != got:
        raise DatasetError(f"{path} has {got} bytes, its header says {expected}: save the array again")
    return torch.from_numpy(np.array(array, order="C"))


def _map_safetensors(path: Path) -> torch.Tensor:
    with safetensors.safe_open(path, framework="pt") as tensors:
        if TENSOR_NAME not in tensors.keys():  # noqa: SIM118 - not a mapping
            raise DatasetError(f"{path} has no tensor {TENSOR_NAME!r}, it has {sorted(tensors.keys())[:5]}")
        return tensors.get_tensor(TENSOR_NAME)


def _checked(values_TD: torch.Tensor, where: str) -> torch.Tensor:
    """The values themselves, when they are a non-empty finite float matrix."""
    if values_TD.ndim != 2 or 0 in values_TD.shape:
        raise DatasetError(f"{where}: expected a matrix [rows, width], got shape {list(values_TD.shape)}")
    if values_TD.dtype not in _DTYPES.values():
        raise DatasetError(f"{where}: expected {' or '.join(_DTYPES)}, got {_dtype_name(values_TD.dtype)}")
    finite_T = values_TD.isfinite().all(dim=1)
    if not finite_T.all():
        bad = (~finite_T).nonzero().flatten()
        raise DatasetError(
            f"{where}: {len(bad)} of {len(values_TD)} rows hold NaN or infinity, the first is row {bad[0]}"
        )
    return values_TD


def _check_spans(spans: tuple[tuple[int, int], ...], num_rows: int, where: str) -> None:
    end = 0
    for index, (start, stop) in enumerate(spans):
        if not end <= start <= stop <= num_rows:
            raise DatasetError(f"{where}: span {index} is rows {start} to {stop} of {num_rows}, after row {end}")
        end = stop


def _with_sidecar(values_TD: torch.Tensor, sha256: str, file: Path) -> PromptEmbeds:
    sidecar = read_json(file)
    try:
        array, stats = sidecar["array"], dict(sidecar["stats"])
        version, expected_sha256, dtype = _integer(sidecar["version"]), array["sha256"], _DTYPES[array["dtype"]]
        spans = tuple((_integer(start), _integer(stop)) for start, stop in sidecar["spans"])
        stats.pop("ratio")
        counts = CompressionStats(**{name: _integer(count) for name, count in stats.items()})
        expanded = tuple(_expanded_text(entry) for entry in sidecar.get("expanded", ()))
        provenance = sidecar["provenance"]
        for value, kind in ((expected_sha256, str), (sidecar["spans"], list), (provenance, dict)):
            if not isinstance(value, kind):
                raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error!r:.200}"
        raise DatasetError(f"{file} is not a sidecar of prompt embeddings ({what}): save the array again") from None
    if version != SIDECAR_VERSION:
        raise DatasetError(f"{file} has version {version}, expected {SIDECAR_VERSION}: save the array again")
    if sha256 != expected_sha256:
        raise DatasetError(
            f"{file} describes another array: sha256 {expected_sha256[:12]}…, the file's is {sha256[:12]}…: "
            "save the array again, or remove the sidecar to use the array on its own"
        )
    _check_spans(spans, len(values_TD), str(file))
    for text in expanded:
        if text.span >= len(spans) or not spans[text.span][0] <= text.rows[0] <= text.rows[1] <= spans[text.span][1]:
            raise DatasetError(f"{file}: rows {text.rows} stayed text, but lie in no span: save the array again")
    if dtype != values_TD.dtype:
        values_TD = _checked(values_TD.to(dtype), f"{file}: the values as {_dtype_name(dtype)}")
    return PromptEmbeds(values_TD=values_TD, spans=spans, stats=counts, expanded=expanded, provenance=provenance)


def _expanded_text(entry: Any) -> ExpandedText:
    (first, stop), chars = entry["rows"], entry["chars"]
    return ExpandedText(
        span=_integer(entry["span"]),
        rows=(_integer(first), _integer(stop)),
        chars=tuple((_integer(begin), _integer(end)) for begin, end in chars),
    )


def _integer(value: Any) -> int:
    """A count as it was written: no number of another kind, none that no array has."""
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r:.80} is no count")
    return value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
