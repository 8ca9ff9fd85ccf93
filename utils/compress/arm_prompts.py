"""Prompts of an evaluation's arms (`arms.py`), made with one checkpoint's tokenizers.

prompts = ArmPrompts(processor)
shown = prompts.shown(arm, memory, question)                     # text, or the memory between its markers
prompt = prompts.expand(arm, processor.parse_raw(f"{shown} {question}", arm.latent_size))
"""

from __future__ import annotations

from fractions import Fraction

from utils.compress.arms import FULL, MIXED, NONE, TRUNCATED, Arm
from utils.compress.expander import Expander
from utils.compress.select import Expansion, MemoryText, Question, select
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt, memory_ids, num_latents


def expansion_of(arm: Arm) -> Expansion | None:
    """What of an arm's memory stays text beside latents: as many tokens as there are latents; None for nothing."""
    if arm.kind not in MIXED:
        return None
    return Expansion(share=Fraction(1, 2 * arm.chunk_size), policy=MIXED[arm.kind])


class ArmPrompts:
    """Shows memories as arms want them.

    Args:
        processor: Of the pair; for arms without latents one with tokenizers only.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._expander = Expander(processor.tokenizers)

    def num_tokens(self, memory: str) -> int:
        """T, a memory's encoder tokens."""
        return len(self._ids(memory))

    def shown(self, arm: Arm, memory: str, query: str) -> str:
        """What stands in a memory's place: text, or the memory between its markers.

        Args:
            arm: The arm.
            memory: The whole text.
            query: What is asked, for `bm25`.

        Raises:
            PromptError: `bm25`, and nothing is asked.
        """
        if arm.has_latents:
            return wrap(memory)
        if arm.kind in (NONE, FULL):
            return memory if arm.kind == FULL else ""
        encoder = self._processor.tokenizers.encoder
        if arm.kind == TRUNCATED:
            ids = self._ids(memory)
            return encoder.decode(ids[: num_latents(len(ids), arm.chunk_size)])
        # At chunk size 1: a row is a token here.
        span = self._processor.parse_raw(wrap(memory), 1).spans[0]
        whole, budget = MemoryText.of(span, encoder), num_latents(len(span.token_ids), arm.chunk_size)
        (ranges,) = select([whole], Question(query), Expansion(tokens=budget))
        return "".join(whole.text[begin:end] for begin, end in ranges)

    def expand(self, arm: Arm, prompt: MemoryPrompt, answer: str | tuple[str, ...] = "") -> MemoryPrompt:
        """A parsed prompt, with text in place of some latents if the arm is a mixed one.

        Args:
            arm: The arm.
            prompt: Parsed at the arm's `latent_size`.
            answer: The right answer, or several that are all needed, for the arm `answer`.
        """
        return self._expander(prompt, expansion_of(arm), answer)

    def _ids(self, memory: str) -> list[int]:
        return memory_ids(self._processor.tokenizers.encoder, [memory])[0]
