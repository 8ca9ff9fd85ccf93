"""Prompts in which the parts of the memory that matter stay text: selection and expansion for one checkpoint.

expander = Expander(tokenizers)
prompt = expander(processor.parse_chat(messages), Expansion(tokens=256))
prompt.spans[0].segments        # what the decoder reads as text
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.compress.select import Expansion, MemoryText, Question, select
from utils.model.expand import expand
from utils.model.prompt import MemoryPrompt, MemorySpan, PromptTokenizers

if TYPE_CHECKING:
    import torch

    Encode = Callable[[Sequence[MemorySpan]], Sequence[torch.Tensor]]


class Expander:
    """Selects and expands with one checkpoint's tokenizers.

    Args:
        tokenizers: Of the checkpoint.
        encode: Latents [n, D] of spans, for the policy `latents`. It is asked for the memory again, which a latent
            cache answers at once.
    """

    def __init__(self, tokenizers: PromptTokenizers, encode: Encode | None = None) -> None:
        self._tokenizers = tokenizers
        self._encode = encode
        # A control token in a memory is data as long as it is compressed. As text it would be obeyed: a line that
        # holds one stays latents.
        controls = [token.content for token in tokenizers.decoder.added_tokens_decoder.values() if token.special]
        self._barred = re.compile("|".join(map(re.escape, controls))) if controls else None

    def __call__(self, prompt: MemoryPrompt, expansion: Expansion | None, answer: str = "") -> MemoryPrompt:
        """The prompt with text in place of some latents; the same without a budget or memory.

        Args:
            prompt: Parsed, all latents.
            expansion: Budget and policy; None: everything stays latents.
            answer: The right answer, for the policy `answer`.

        Raises:
            PromptError: There is nothing to select by.
            ConfigError: The encoder has no fast tokenizer, or the policy needs an encoder.
        """
        if expansion is None or expansion.is_off or not prompt.spans:
            return prompt
        memories = [MemoryText.of(span, self._tokenizers.encoder, self._barred) for span in prompt.spans]

        def encode(_: Any) -> list[np.ndarray]:
            assert self._encode is not None
            asked = self._query_span(expansion.query or prompt.query, prompt.spans[0].chunk_size)
            return [latents.float().cpu().numpy() for latents in self._encode([asked, *prompt.spans])]

        question = Question(prompt.query, answer, encode if self._encode else None)
        chosen = select(memories, question, expansion)
        return expand(prompt, chosen, [memory.offsets for memory in memories], self._tokenizers)

    def _query_span(self, query: str, chunk_size: int) -> MemorySpan:
        ids = self._tokenizers.encoder(query, add_special_tokens=False)["input_ids"]
        return MemorySpan(text=query, token_ids=ids, start=0, stop=-(-len(ids) // chunk_size), chunk_size=chunk_size)
