"""Addresses and keys."""

from __future__ import annotations

import pytest

from tests.support.processes import traced
from utils.client.connection import api_base, find_api_key
from utils.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        (" http://127.0.0.1:8000/v1/ ", "http://127.0.0.1:8000/v1"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
        ("https://host/prefix/v1/completions", "https://host/prefix/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_every_usual_spelling_of_an_address(given: str, base: str) -> None:
    assert api_base(given) == base


@pytest.mark.parametrize("given", ["", "ftp://host", "http://", "http://host:port", "http://host/v1?key=1"])
def test_unusable_addresses(given: str) -> None:
    with pytest.raises(ConfigError, match="not usable"):
        api_base(given)


def test_key_from_flag_then_vllm_then_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert find_api_key() == "EMPTY"
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    assert find_api_key() == "openai"
    monkeypatch.setenv("VLLM_API_KEY", "vllm")
    assert find_api_key() == "vllm"
    assert find_api_key("flag") == "flag"


def test_importing_the_rules_loads_neither_torch_nor_openai() -> None:
    assert not {"torch", "openai"} & traced("-c", "import utils.client.connection")[1]
