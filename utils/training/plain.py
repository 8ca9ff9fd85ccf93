"""Dataclasses from plain values, as YAML and JSON give them: strictly, and with the place of what is wrong.

    settings = from_plain(TrainConfig, yaml.safe_load(text))       # "stages[1].rows: expected a whole number, got '2'"

The machines that train may have little more than torch, transformers and peft. Of their packages none does this:
transformers' `HfArgumentParser.parse_dict` neither nests nor looks at types, and huggingface_hub's `strict` checks
types, but turns no mapping into a dataclass and no list into a tuple.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import ConfigError

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list"}


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> Any:
    """The values of a YAML file, laid over those of the file that it names under `base`, relative to itself.

    Mappings are merged key by key and lists of mappings place by place; anything else is replaced.

    Args:
        path: The file.
        above: Files that are based on it.

    Raises:
        ConfigError: A file is missing or no YAML, or its own base.
    """
    if path in above:
        raise ConfigError(f"{path}: base: it is based on itself, through {', '.join(map(str, above))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist{f' (the base of {above[-1]})' if above else ''}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping) or "base" not in values:
        return values
    if not isinstance(values["base"], str):
        raise ConfigError(f"{path}: base: expected a text, got {values['base']!r:.100}")
    below = read_layers(path.parent / values["base"], (*above, path))
    return _laid_over(below, {key: value for key, value in values.items() if key != "base"})


def _laid_over(below: Any, value: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(value, Mapping):
        return {**below, **{key: _laid_over(below.get(key), own) for key, own in value.items()}}
    if isinstance(below, list) and isinstance(value, list) and all(isinstance(x, Mapping) for x in (*below, *value)):
        changed = [_laid_over(*pair) for pair in zip(below, value, strict=False)]
        return [*changed, *below[len(value) :], *value[len(below) :]]
    return value


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """Turn a plain value into an annotated type: a dataclass, `X | None`, a literal, tuple, dict or simple type.

    Args:
        kind: The type.
        value: What YAML or JSON gave.
        where: Its place, for messages; empty at the top.

    Raises:
        ConfigError: A key is unknown or missing, or a value is of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (origin is typing.Literal and value in arguments):
        return value
    if origin is types.UnionType:
        return None if value is None else from_plain(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) != len(value):
            raise ConfigError(_at(where, f"expected {len(kinds)} values, got {len(value)}"))
        return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if isinstance(value, Mapping):
        if dataclasses.is_dataclass(kind):
            return _dataclass(kind, value, where)
        if origin is dict:
            return {
                from_plain(arguments[0], k, where): from_plain(arguments[1], v, f"{where}.{k}")
                for k, v in value.items()
            }
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a text
        except (ValueError, OverflowError):
            pass
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = _NAMES.get(origin or kind, "keys and values")
    if origin is typing.Literal:
        expected = f"one of {', '.join(arguments)}"
    raise ConfigError(_at(where, f"expected {expected}, got {value!r:.100}"))


def _dataclass(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if unknown := sorted(str(key) for key in values.keys() - hints.keys()):
        raise ConfigError(_at(where, f"unknown key {unknown[0]}; the keys are {', '.join(sorted(hints))}"))
    if missing := sorted(required - values.keys()):
        raise ConfigError(_at(where, f"key {missing[0]} is missing"))
    named = {name: from_plain(hints[name], v, f"{where}.{name}" if where else name) for name, v in values.items()}
    try:
        return kind(**named)
    except ConfigError as error:
        raise ConfigError(_at(where, str(error))) from None


def _at(where: str, message: str) -> str:
    return f"{where}: {message}" if where else message
