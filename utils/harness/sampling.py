"""lm-eval's generation arguments, which tasks and `--gen_kwargs` give, as a `Sampling`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from utils.client.completion import Sampling
from utils.errors import ConfigError

logger = logging.getLogger(__name__)

# Names of one thing, the first that is there counts; lm-eval's own order.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON: dict[str, type[float] | type[int]] = {
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
# What tasks give that asks for nothing.
_NEUTRAL = {"num_beams": 1}
_KNOWN = (*_MAX_TOKENS, "until", "do_sample", "temperature", *_PASSED_ON)


def read_sampling(arguments: Mapping[str, Any], default_max_tokens: int) -> Sampling:
    """How an answer is drawn.

    Args:
        arguments: `until` (one stop string or several), `do_sample`, `temperature`, `max_gen_toks` (or another name of
            it), `top_p`, `top_k`, `min_p`, `repetition_penalty`, `seed`. Greedy without any. Values that are None say
            nothing.
        default_max_tokens: New tokens where the arguments do not say.

    Returns:
        The settings. Without a seed a decoder goes on drawing, so that repeats of a request differ.

    Raises:
        ConfigError: An argument that is not known, or a value that cannot be.
    """
    said = {name: value for name, value in arguments.items() if value is not None}
    given = {name: value for name, value in said.items() if _NEUTRAL.get(name) != value}
    if unknown := sorted(set(given) - set(_KNOWN)):
        raise ConfigError(
            f"generation argument {unknown[0]}={given[unknown[0]]!r} is not known here: it may be one of "
            f"{', '.join(_KNOWN)}; --gen_kwargs {unknown[0]}=None leaves a task's out"
        )
    limits = [given[name] for name in _MAX_TOKENS if name in given]
    max_tokens = int(_number("max_gen_toks", limits[0] if limits else default_max_tokens))
    if max_tokens < 1:
        raise ConfigError(f"max_gen_toks must be at least 1, got {max_tokens}")
    passed_on = {name: kind(_number(name, given[name])) for name, kind in _PASSED_ON.items() if name in given}
    values: dict[str, Any] = {"temperature": _temperature(given), "seed": None, **passed_on}
    return Sampling(max_tokens=max_tokens, **values, stop=_stop_strings(given.get("until", ())))


def _temperature(given: Mapping[str, Any]) -> float:
    temperature = _number("temperature", given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
    if temperature < 0:
        raise ConfigError(f"temperature must not be negative, got {temperature}")
    if temperature and given.get("do_sample") is False:
        logger.warning("do_sample is false: the temperature %s is not used, decoding is greedy", temperature)
        return 0.0
    return temperature


def _stop_strings(until: Any) -> tuple[str, ...]:
    strings = (until,) if isinstance(until, str) else tuple(until)
    if wrong := [value for value in strings if not isinstance(value, str)]:
        raise ConfigError(f"until must be a text or a list of texts, got {wrong[0]!r}")
    # The empty text, which ends every answer before it begins, stands in tasks for "no stop string".
    return tuple(dict.fromkeys(filter(None, strings)))


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"generation argument {name} must be a number, got {value!r}") from None
