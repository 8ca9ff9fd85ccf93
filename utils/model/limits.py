"""Does a prompt fit the decoder, how much memory is free, and what to do when it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.errors import ConfigError, PromptError


def check_prompt_fits(num_rows: int, decoder_config: Any, max_new_tokens: int = 0, name: str = "the prompt") -> None:
    """Raise `PromptError` if a prompt of `num_rows` and its answer exceed the decoder's positions."""
    room = getattr(decoder_config, "max_position_embeddings", None)
    if room is None or num_rows + max_new_tokens <= room:
        return
    wanted = f"{num_rows} rows" + (f" + {max_new_tokens} new tokens" if max_new_tokens else "")
    raise PromptError(
        f"{name} needs {wanted}, but the decoder has {room} positions: compress more (larger --chunk-size), shorten "
        "the text outside the memory" + (", or lower --max-tokens" if max_new_tokens else "")
    )


def free_device_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device; None for any other."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn an allocator's failure into an error that says what was tried and which flag lowers it."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # The CPU allocator has no exception type of its own.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ConfigError(f"out of memory while {doing}: {advice}, or use a smaller dtype") from error
        raise
