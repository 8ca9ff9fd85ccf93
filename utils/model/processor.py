"""Tokenizers, chunk size and limit in one value that parses prompts; parsing itself is in `utils.model.prompt`.

processor = Processor(tokenizers=tokenizers, chunk_size=8)
prompt = processor.parse_chat([{"role": "user", "content": "…"}])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import PromptError
from utils.model.prompt import MemoryLimit, MemoryPrompt, PromptTokenizers, parse_chat_prompt, parse_raw_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """Tokenizers and limits in one place.

    Attributes:
        tokenizers: Decoder and encoder tokenizer.
        chunk_size: Encoder tokens per latent where a call names none.
        limit: Longest allowed span; no limit by default.
    """

    tokenizers: PromptTokenizers
    chunk_size: int
    limit: MemoryLimit | None = None

    def parse_raw(
        self, text: str, chunk_size: int | Sequence[int] | None = None, *, add_special_tokens: bool = True
    ) -> MemoryPrompt:
        """Parse one text; see `parse_raw_prompt`."""
        sizes = self.chunk_size if chunk_size is None else chunk_size
        return parse_raw_prompt(text, self.tokenizers, sizes, self.limit, add_special_tokens=add_special_tokens)

    def parse_chat(
        self, messages: Sequence[Mapping[str, Any]], chunk_size: int | Sequence[int] | None = None, **template: Any
    ) -> MemoryPrompt:
        """Parse a chat; see `parse_chat_prompt`."""
        sizes = self.chunk_size if chunk_size is None else chunk_size
        return parse_chat_prompt(messages, self.tokenizers, sizes, self.limit, **template)

    def target_ids(self, target: str) -> list[int]:
        """Decoder tokens of a target, with the end token.

        Raises:
            PromptError: The target is empty.
        """
        ids = self.tokenizers.decoder(target, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PromptError("a target is empty: there is nothing to learn from it")
        end = self.tokenizers.decoder.eos_token_id
        return [*ids, end] if end is not None else list(ids)
