"""Prompts in which the parts of the memory that matter stay text: selection and expansion for one checkpoint.

expander = Expander(tokenizers)
prompt = expander(processor.parse_chat(messages), Expansion(tokens=256))
prompt.spans[0].segments        # what the decoder reads as text
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.compress.select import Expansion, MemoryText, Question, select
from utils.model.expand import expand
from utils.model.markers import control_pattern
from utils.model.prompt import MemoryPrompt, MemorySpan, PromptTokenizers, memory_ids

if TYPE_CHECKING:
    import torch

    Encode = Callable[[Sequence[MemorySpan]], Sequence[torch.Tensor]]

# Characters of the memories whose tokens' places are remembered, for the next question about them.
_REMEMBERED_CHARS = 4_000_000


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
        self._barred = control_pattern(tokenizers.decoder)
        self._remembered: OrderedDict[tuple[str, int, int], MemoryText] = OrderedDict()

    def __call__(
        self,
        prompt: MemoryPrompt,
        expansion: Expansion | None,
        answer: str | tuple[str, ...] = "",
        encode: Encode | None = None,
    ) -> MemoryPrompt:
        """The prompt with text in place of some latents; the same without a budget or memory.

        Args:
            prompt: Parsed, all latents.
            expansion: Budget and policy; None: everything stays latents.
            answer: The right answer, or several that are all needed, for the policy `answer`.
            encode: In place of the expander's own.

        Raises:
            PromptError: There is nothing to select by.
            ConfigError: The encoder has no fast tokenizer, or the policy needs an encoder.
        """
        if expansion is None or expansion.is_off or not prompt.spans:
            return prompt
        memories = [self._memory_text(span) for span in prompt.spans]
        to_latents = encode or self._encode

        def arrays(_: Any) -> list[np.ndarray]:
            assert to_latents is not None
            asked = self._query_span(expansion.query or prompt.query, prompt.spans[0].chunk_size)
            return [latents.float().cpu().numpy() for latents in to_latents([asked, *prompt.spans])]

        question = Question(prompt.query, answer, arrays if to_latents else None)
        chosen = select(memories, question, expansion)
        return expand(prompt, chosen, [memory.offsets for memory in memories], self._tokenizers)

    def _memory_text(self, span: MemorySpan) -> MemoryText:
        """A span as selection sees it; those of the last calls are remembered."""
        key = (span.text, len(span.token_ids), span.chunk_size)
        memory = self._remembered.pop(key, None) or MemoryText.of(span, self._tokenizers.encoder, self._barred)
        self._remembered[key] = memory
        while len(self._remembered) > 1 and sum(len(text) for text, *_ in self._remembered) > _REMEMBERED_CHARS:
            self._remembered.popitem(last=False)
        return memory

    def _query_span(self, query: str, chunk_size: int) -> MemorySpan:
        (ids,) = memory_ids(self._tokenizers.encoder, [query])
        return MemorySpan(text=query, token_ids=ids, start=0, stop=-(-len(ids) // chunk_size), chunk_size=chunk_size)
