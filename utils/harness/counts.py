"""How much of what a model was asked was memory, and what became of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from utils.model.prompt import MemoryPrompt

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Counts:
    """Sums over requests.

    Attributes:
        requests: All of them.
        with_memory: Those whose context has memory.
        too_long: Those that were not answered, for the decoder has too few positions.
        prompt_rows: Rows of their prompts.
        memory_tokens: Encoder tokens of their memories.
        num_latents: Latents that stand for these.
        text_rows: Rows of memory that stayed text.
    """

    requests: int = 0
    with_memory: int = 0
    too_long: int = 0
    prompt_rows: int = 0
    memory_tokens: int = 0
    num_latents: int = 0
    text_rows: int = 0

    def add(self, prompts: Sequence[MemoryPrompt], too_long: int = 0) -> None:
        """Count the prompts of one run of requests, and say what they were."""
        memory = [prompt for prompt in prompts if prompt.spans]
        self.requests += len(prompts)
        self.with_memory += len(memory)
        self.too_long += too_long
        self.prompt_rows += sum(len(prompt.input_ids) for prompt in prompts)
        tokens = sum(prompt.memory_tokens for prompt in memory)
        latents = sum(prompt.num_latents for prompt in memory)
        rows = sum(prompt.text_rows for prompt in memory)
        self.memory_tokens += tokens
        self.num_latents += latents
        self.text_rows += rows
        if too_long:
            logger.warning("%d of %d requests were too long and not answered", too_long, len(prompts))
        if memory:
            said = (len(memory), len(prompts), tokens, latents, rows)
            logger.info("%d of %d requests have memory: %d tokens → %d latents + %d rows of text", *said)
        elif prompts:
            logger.warning(
                "none of %d requests has memory, so nothing was compressed: let tasks write markers around it, or pass "
                "--model_args auto_memory=500",
                len(prompts),
            )

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return asdict(self)
