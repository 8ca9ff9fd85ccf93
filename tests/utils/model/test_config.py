"""`CompressionConfig` and its file form."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import ConfigError
from utils.model.config import CompressionConfig


def from_json(**changes: Any) -> CompressionConfig:
    return CompressionConfig.from_json({"compression_ratio": 4, "encoder_window_size": 32, **changes}, "the.json")


@given(
    st.integers(1, 64),
    st.integers(1, 16),
    st.sampled_from(["mean", "eos", "concat", "rotary"]),
    st.integers(0, 9),
    st.sampled_from(["causal", "bidirectional"]),
    st.sampled_from(["mlp", "mlp_attn"]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_json_round_trip(
    chunk: int, times: int, pooling: str, overlap: int, mask: str, adapter: str, rope: str
) -> None:
    config = CompressionConfig(
        chunk_size=chunk,
        window=chunk * times,
        pooling=pooling,
        overlap=overlap,
        mask=mask,
        adapter=adapter,
        num_adapter_layers=0 if adapter == "mlp" else 2,
        chunk_sizes=(chunk,),
        rope_dtype=rope,
    )
    assert CompressionConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_published_defaults() -> None:
    config = from_json()
    assert (config.pooling, config.overlap, config.mask, config.adapter) == ("mean", 0, "causal", "mlp")
    assert from_json(adapter_type="attn_mlp").num_adapter_layers == 1
    # Published mlp checkpoints may carry a layer count that means nothing.
    assert from_json(adapter_type="mlp", num_adapter_layers=3).num_adapter_layers == 0


def test_chunk_size_is_an_alias() -> None:
    values = {"chunk_size": 8, "encoder_window_size": 32}
    assert CompressionConfig.from_json(values).chunk_size == 8
    with pytest.raises(ConfigError, match="chunk_size and compression_ratio differ"):
        from_json(chunk_size=8)


def test_unknown_keys_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        from_json(flavour="mint", colour="red")
    assert "the.json: keys that mean nothing here: colour, flavour" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pooling": "max"}, "pooling: expected one of mean, eos, concat, rotary, got 'max'"),
        ({"encoder_mask_type": "full"}, "encoder_mask_type"),
        ({"adapter_type": "cnn"}, "adapter_type"),
        ({"encoder_rope_dtype": "float64"}, "encoder_rope_dtype"),
        ({"compression_ratio": 0}, "compression_ratio: expected a whole number of at least 1, got 0"),
        ({"compression_ratio": "4"}, "compression_ratio"),
        ({"compression_ratio": True}, "compression_ratio"),
        ({"boundary_overlap": -1}, "boundary_overlap"),
        ({"encoder_window_size": 30}, "30 is not a multiple of the chunk size 4: choose one of 1, 2, 3, 5"),
        ({"adapter_type": "attn_mlp", "num_adapter_layers": 0}, "num_adapter_layers"),
        ({"adapter_type": "attn_mlp", "pooling": "concat"}, "cannot take pooling concat"),
        ({"chunk_sizes": 8}, "chunk_sizes"),
        ({"chunk_sizes": ["8"]}, "chunk_sizes"),
    ],
)
def test_impossible_values_name_file_and_key(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        from_json(**changes)
    assert str(raised.value).startswith("the.json: ")


@pytest.mark.parametrize("key", ["compression_ratio", "encoder_window_size"])
def test_missing_keys(key: str) -> None:
    values = {"compression_ratio": 4, "encoder_window_size": 32}
    del values[key]
    with pytest.raises(ConfigError, match=f"key {key} is missing"):
        CompressionConfig.from_json(values)


@pytest.mark.parametrize("values", [[], "text", 3, None])
def test_a_file_that_is_no_object(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"the.json: expected a JSON object"):
        CompressionConfig.from_json(values, "the.json")


def test_another_chunk_size(caplog: pytest.LogCaptureFixture) -> None:
    config = from_json(chunk_sizes=[4, 8])
    assert config.with_chunk_size(None) is config
    assert (config.with_chunk_size(8).chunk_size, config.with_chunk_size(8).window) == (8, 32)
    assert not caplog.records
    config.with_chunk_size(16)
    assert "chunk size 16: this checkpoint was trained for 4, 8" in caplog.text
    with pytest.raises(ConfigError, match=r" 5: .* 1, 2, 4, 8, 16, 32"):
        config.with_chunk_size(5)
    with pytest.raises(ConfigError, match="concat pooling fixes it to 4"):
        from_json(pooling="concat").with_chunk_size(8)


def test_the_window_of_code_llava_follows_the_chunk_size() -> None:
    config = CompressionConfig.code_llava(8)
    assert (config.pooling, config.window, config.overlap, config.mask, config.adapter) == (
        "eos",
        8,
        0,
        "causal",
        "mlp",
    )
    assert config.with_chunk_size(6).window == 6
    assert config.with_chunk_size(6).with_chunk_size(3).window == 3


def test_a_fixed_window_stays_whatever_the_order_of_chunk_sizes() -> None:
    config = from_json()
    assert config.with_chunk_size(32).with_chunk_size(8) == config.with_chunk_size(8)
    assert config.with_chunk_size(32).with_chunk_size(8).window == 32
