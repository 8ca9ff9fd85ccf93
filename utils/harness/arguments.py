"""`--model_args` of `code-llava`: their names, their values, and the checkpoint that they open.

arguments = ModelArguments.read({"chunk_size": 8, "expand": "1/16"})
model, processor = arguments.open()
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from utils.compress.select import Expansion
from utils.errors import ConfigError
from utils.flags import encoder_settings, expansion, open_cache
from utils.inference.generation import open_pair
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.processor import Processor
from utils.model.prompt import MemoryLimit

TOO_LONG = ("error", "empty")
# What lm-eval's command passes on where the user names no device.
_UNNAMED_DEVICE = "cuda:0"
_LEAST = {"chunk_size": 1, "expand_tokens": 0, "auto_memory": 1, "batch_size": 1, "max_gen_toks": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """A model of lm-eval as the user describes it.

    Attributes:
        checkpoint: Folder, run folder or hub id; None for the embedded default.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        expand: Share of the memory tokens that stays text, as "1/16".
        expand_tokens: The same in tokens.
        expand_policy: What chooses it; bm25 where there is a budget.
        auto_memory: Where a context has no markers, its longest part becomes memory if it has so many encoder tokens
            (`utils.harness.context.mark_longest`); None: it stays text.
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        dtype: One of `utils.checkpoint.settings.DTYPE_NAMES`.
        batch_size: Prompts of one forward pass.
        max_gen_toks: New tokens where neither the task nor `--gen_kwargs` says.
        too_long: What becomes of a question that the decoder has no positions for: "error" ends the run before anything
            is answered; "empty" counts it, and its answer is the empty text.
        cache: Take latents from the latent cache, and keep them there.
    """

    checkpoint: str | None = None
    chunk_size: int | None = None
    expand: str | float | None = None
    expand_tokens: int | None = None
    expand_policy: str | None = None
    auto_memory: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 4
    max_gen_toks: int = 256
    too_long: str = "error"
    cache: bool = True

    @classmethod
    def read(cls, given: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> ModelArguments:
        """Check what the user wrote.

        Args:
            given: Names and values; None for what is not said. Numbers may be texts.
            flags: `batch_size` and `device` of lm-eval's own flags, where `given` does not say. A `max_batch_size` is
                an error: there is no automatic batch size here.

        Raises:
            ConfigError: There is no such argument, or its value cannot be.
        """
        values = {name: value for name, value in (flags or {}).items() if value is not None}
        if values.get("device") == _UNNAMED_DEVICE and not torch.cuda.is_available():
            values["device"] = "auto"
        values |= {name: value for name, value in given.items() if value is not None}
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"code-llava has no argument {name!r}: it has {', '.join(known)}. What a task needs goes into "
                    "--metadata"
                )
        for name in _LEAST.keys() & values.keys():
            values[name] = _whole(name, values[name])
        if "checkpoint" in values:
            # lm-eval reads "8" as a number, a folder's name or not.
            values["checkpoint"] = str(values["checkpoint"])
        if values.get("too_long", "error") not in TOO_LONG:
            raise ConfigError(f"too_long must be one of {', '.join(TOO_LONG)}, got {values['too_long']!r}")
        if type(values.get("cache", True)) is not bool:
            raise ConfigError(f"cache must be True or False, got {values['cache']!r}")
        return cls(**values)

    @property
    def expansion(self) -> Expansion | None:
        """What of each memory stays text; None: nothing.

        Raises:
            ConfigError: The arguments for it do not go together, or a value is out of range.
        """
        return expansion(self._flags())

    def open(self) -> tuple[CodeLLaVAModel, Processor]:
        """Load the checkpoint.

        Raises:
            CheckpointError: It is missing, incomplete or inconsistent.
            ConfigError: It cannot serve the chunk size, or the device is not there.
        """
        flags = self._flags()
        return open_pair(self.checkpoint, self.chunk_size, encoder_settings(flags), open_cache(flags), MemoryLimit())

    def to_json(self) -> dict[str, Any]:
        """The arguments as JSON values, for results."""
        return asdict(self)

    def _flags(self) -> argparse.Namespace:
        """The same as the flags of our commands."""
        unsaid = {"attn_implementation": None, "batch_tokens": None, "cache_dir": None, "expand_query": None}
        return argparse.Namespace(**unsaid, **asdict(self), no_cache=not self.cache)


def _whole(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < _LEAST[name]:
        raise ConfigError(f"{name} must be a whole number of at least {_LEAST[name]}, got {value!r}")
    return int(value)
