"""How a checkpoint compresses: `CompressionConfig` and its file form, `model_config.json`.

    {"compression_ratio": 8, "encoder_window_size": 512, "pooling": "mean", "encoder_mask_type": "causal",
     "boundary_overlap": 0, "adapter_type": "mlp"}

The two published layouts are one model: Code-LLaVA is {pooling eos, window = chunk size, overlap 0, causal, mlp}.
Source of the keys: LCLM, "End-to-End Context Compression at Scale", arXiv 2606.09659. `chunk_sizes`,
`encoder_rope_dtype` and `token_columns` are ours.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from utils.errors import ConfigError

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "eos", "concat", "rotary")
MASKS = ("causal", "bidirectional")
ADAPTERS = ("mlp", "attn_mlp", "mlp_attn")
ROPE_DTYPES = ("float32", "bfloat16")
CONFIG_FILE = "model_config.json"

_JSON_KEYS = {
    "compression_ratio": "chunk_size",
    "encoder_window_size": "window",
    "pooling": "pooling",
    "encoder_mask_type": "mask",
    "boundary_overlap": "overlap",
    "adapter_type": "adapter",
    "num_adapter_layers": "num_adapter_layers",
    "chunk_sizes": "chunk_sizes",
    "encoder_rope_dtype": "rope_dtype",
    "token_columns": "token_columns",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionConfig:
    """What turns encoder tokens into latents.

    Attributes:
        chunk_size: Encoder tokens per latent, R.
        window: Core tokens that the encoder sees at once, W; a multiple of R.
        pooling: How the hidden states of a chunk become one vector: their mean, the state of an end marker, all side by
            side, or the mean and the mean after each was turned by its place (ours; see `pooling.py`).
        overlap: Context tokens before a window (and after it, if bidirectional) that are read but not pooled, O.
        mask: Attention inside a window.
        adapter: Kind of adapter.
        num_adapter_layers: Attention layers in the adapter; 0 for mlp.
        chunk_sizes: Chunk sizes the weights were trained for; empty when unknown.
        rope_dtype: Precision of the encoder's rotary frequencies. The published Code-LLaVA programs cast the whole
            model, these frequencies included, to bfloat16; their checkpoints give the same latents only that way.
        token_columns: Whether the adapter also reads what the encoder begins with, the embeddings of a chunk's tokens,
            under rotary pooling: its last states may have overwritten how a token is spelt.
        window_follows: Whether a window is one chunk whatever the chunk size, as Code-LLaVA's is; None: it is if
            window and chunk size are equal here. Kept when the chunk size changes.
    """

    chunk_size: int
    window: int
    pooling: str = "mean"
    overlap: int = 0
    mask: str = "causal"
    adapter: str = "mlp"
    num_adapter_layers: int = 0
    chunk_sizes: tuple[int, ...] = ()
    rope_dtype: str = "float32"
    token_columns: bool = False
    window_follows: bool | None = None

    def __post_init__(self) -> None:
        if self.window_follows is None:
            object.__setattr__(self, "window_follows", self.window == self.chunk_size)
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("encoder_mask_type", self.mask, MASKS)
        _check_choice("adapter_type", self.adapter, ADAPTERS)
        _check_choice("encoder_rope_dtype", self.rope_dtype, ROPE_DTYPES)
        _check_int("compression_ratio", self.chunk_size, 1)
        _check_int("encoder_window_size", self.window, 1)
        _check_int("boundary_overlap", self.overlap, 0)
        _check_int("num_adapter_layers", self.num_adapter_layers, 0 if self.adapter == "mlp" else 1)
        if self.window % self.chunk_size:
            raise ConfigError(
                f"encoder_window_size {self.window} is not a multiple of the chunk size {self.chunk_size}: "
                f"choose one of {_divisors(self.window)}"
            )
        if not isinstance(self.token_columns, bool):
            raise ConfigError(f"token_columns: expected true or false, got {self.token_columns!r}")
        if self.token_columns and (self.pooling == "eos" or self.adapter == "attn_mlp"):
            raise ConfigError(
                f"token_columns: pooling {self.pooling} with adapter_type {self.adapter} has no place for them: eos "
                "pooling reads no states of tokens, attn_mlp has layers of the encoder's width"
            )
        if self.adapter == "attn_mlp" and self.pooling in ("concat", "rotary"):
            raise ConfigError(
                f"adapter_type attn_mlp has layers of the encoder's width and cannot take pooling {self.pooling}"
            )

    @property
    def causal(self) -> bool:
        """Whether a token sees only the tokens before it."""
        return self.mask == "causal"

    def with_chunk_size(self, chunk_size: int | None) -> CompressionConfig:
        """The same compression at another chunk size.

        Code-LLaVA's window follows the chunk size; any other stays and must be a multiple of it.

        Raises:
            ConfigError: This checkpoint cannot serve that chunk size.
        """
        if chunk_size is None or chunk_size == self.chunk_size:
            return self
        if self.pooling == "concat":
            raise ConfigError(
                f"chunk size {chunk_size} is not possible: concat pooling fixes it to {self.chunk_size}, "
                "the adapter's input width depends on it"
            )
        if self.chunk_sizes and chunk_size not in self.chunk_sizes:
            _warn_untrained(chunk_size, self.chunk_sizes)
        window = chunk_size if self.window_follows else self.window
        return dataclasses.replace(self, chunk_size=chunk_size, window=window)

    def to_json(self) -> dict[str, Any]:
        """The `model_config.json` form; keys that hold their default meaning of absence are left out."""
        values = {key: getattr(self, name) for key, name in _JSON_KEYS.items()}
        values["chunk_sizes"] = list(self.chunk_sizes)
        if self.adapter == "mlp":
            del values["num_adapter_layers"]
        if not self.chunk_sizes:
            del values["chunk_sizes"]
        if self.rope_dtype == "float32":
            del values["encoder_rope_dtype"]
        if not self.token_columns:
            del values["token_columns"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = CONFIG_FILE) -> CompressionConfig:
        """Read the `model_config.json` form; `chunk_size` is accepted for `compression_ratio`, unknown keys are logged.

        Raises:
            ConfigError: A key is missing or its value is impossible; the message names file and key.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, got {type(values).__name__}")
        known = dict(values)
        if "chunk_size" in known:
            ratio = known.setdefault("compression_ratio", known["chunk_size"])
            if ratio != known.pop("chunk_size"):
                raise ConfigError(f"{where}: chunk_size and compression_ratio differ; keep one of them")
        unknown = sorted(set(known) - set(_JSON_KEYS))
        if unknown:
            logger.warning("%s: keys that mean nothing here: %s", where, ", ".join(unknown))
        for key in ("compression_ratio", "encoder_window_size"):
            if key not in known:
                raise ConfigError(f"{where}: key {key} is missing")
        fields = {name: known[key] for key, name in _JSON_KEYS.items() if key in known}
        if fields.get("adapter", "mlp") == "mlp":
            fields["num_adapter_layers"] = 0
        else:
            fields.setdefault("num_adapter_layers", 1)
        try:
            fields["chunk_sizes"] = _sizes(fields.get("chunk_sizes", []))
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def code_llava(cls, chunk_size: int) -> CompressionConfig:
        """The compression of published Code-LLaVA checkpoints, which do not say it themselves."""
        return cls(chunk_size=chunk_size, window=chunk_size, pooling="eos", rope_dtype="bfloat16")


@cache
def _warn_untrained(chunk_size: int, trained: tuple[int, ...]) -> None:
    """Once a process: spans may name their chunk size one by one."""
    logger.warning("chunk size %d: this checkpoint was trained for %s", chunk_size, ", ".join(map(str, trained)))


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")


def _check_int(key: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{key}: expected a whole number of at least {minimum}, got {value!r}")


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ConfigError(f"chunk_sizes: expected a list, got {values!r}")
    for value in values:
        _check_int("chunk_sizes", value, 1)
    return tuple(values)


def _divisors(number: int) -> str:
    divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
    return ", ".join(divisors)
