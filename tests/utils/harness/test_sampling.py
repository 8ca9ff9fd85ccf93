"""lm-eval's generation arguments."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from utils.client.completion import Sampling
from utils.errors import ConfigError
from utils.harness.sampling import read_sampling


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, {"max_tokens": 9}),
        ({"until": "\n", "max_gen_toks": 3}, {"stop": ("\n",), "max_tokens": 3}),
        ({"until": ["\n\n", "Q:", "", "Q:"], "do_sample": False, "temperature": 0.0}, {"stop": ("\n\n", "Q:")}),
        ({"until": None, "max_tokens": 4}, {"max_tokens": 4}),
        ({"max_new_tokens": 5, "max_gen_toks": 6}, {"max_tokens": 6}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 3},
            {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 3},
        ),
        ({"num_beams": 1, "other": None}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_arguments_are_the_settings(arguments: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert read_sampling(arguments, 9) == Sampling(**{"max_tokens": 9, "seed": None, **wanted})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"max_gen_toks": "many"}, "many"),
        ({"temperature": -1}, "temperature"),
        ({"until": [3]}, "until"),
    ],
)
def test_what_cannot_be_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_sampling(arguments, 9)


def test_a_temperature_that_is_not_used_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_sampling({"do_sample": False, "temperature": 0.7}, 9).temperature == 0
    assert "0.7" in caplog.text
