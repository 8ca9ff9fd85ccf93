"""What the decoder reads in the memory's place: the arms of an evaluation, on the same examples.

    none           nothing: the question alone
    full           the whole text
    memory@4       latents at chunk size 4
    truncated@4    text: as many tokens of its beginning
    bm25@4         text: as many tokens of the lines that BM25 selects
    expand@4       half as many latents, at chunk size 8, and the other half of the rows text that BM25 selects
    random@4       the same, selected by chance
    answer@4       the same, selected by the answer: what a perfect selector would reach

All arms at one chunk size have the same budget of decoder rows for a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from utils.compress.expander import Expander
from utils.compress.select import Expansion, MemoryText, Question, select
from utils.errors import ConfigError
from utils.model.config import CompressionConfig
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt, num_latents
from utils.training.data.examples import Example

NONE, FULL, MEMORY, TRUNCATED, BM25 = "none", "full", "memory", "truncated", "bm25"
# Arm → the policy that selects its text.
MIXED = {"expand": "bm25", "random": "random", "answer": "answer"}
KINDS = (NONE, FULL, MEMORY, TRUNCATED, BM25, *MIXED)
_WITHOUT_QUESTION = (FULL, MEMORY, TRUNCATED)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to show the memory.

    Attributes:
        kind: One of `KINDS`.
        chunk_size: Memory tokens for each decoder row; 1 where nothing is left out, or everything.
    """

    kind: str
    chunk_size: int = 1

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.kind if self.kind in (NONE, FULL) else f"{self.kind}@{self.chunk_size}"

    @property
    def latent_size(self) -> int | None:
        """Chunk size of its latents; None without any."""
        return {MEMORY: 1, **dict.fromkeys(MIXED, 2)}[self.kind] * self.chunk_size if self.has_latents else None

    @property
    def has_latents(self) -> bool:
        """Whether the memory is encoded."""
        return self.kind == MEMORY or self.kind in MIXED

    @property
    def needs_question(self) -> bool:
        """Whether it means nothing where nothing is asked, as where text is continued."""
        return self.kind not in _WITHOUT_QUESTION


def find_arms(kinds: Sequence[str], chunk_sizes: Sequence[int], config: CompressionConfig) -> list[Arm]:
    """The arms of these kinds at these chunk sizes.

    Raises:
        ConfigError: An unknown kind, or a pair that cannot serve the chunk size of an arm's latents.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--arms: no arm {kind!r}: choose among {', '.join(KINDS)}")
    arms = [Arm(kind) for kind in (NONE, FULL) if kind in kinds]
    arms += [Arm(kind, size) for size in chunk_sizes for kind in KINDS[2:] if kind in kinds]
    for arm in arms:
        config.with_chunk_size(arm.latent_size)
        if arm.kind in MIXED and config.chunk_sizes and arm.latent_size not in config.chunk_sizes:
            raise ConfigError(
                f"{arm.name} has latents at chunk size {arm.latent_size}, the pair was trained for "
                f"{', '.join(map(str, config.chunk_sizes))}: choose smaller ones with --chunk-size, or other --arms"
            )
    return arms


class Prompts:
    """Makes the prompts of the arms for one pair.

    Args:
        processor: Of the pair.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._expander = Expander(processor.tokenizers)

    def num_tokens(self, example: Example) -> int:
        """T, the memory's encoder tokens."""
        return len(self._ids(example))

    def prompt(self, example: Example, arm: Arm) -> MemoryPrompt:
        """An example as an arm shows it."""
        if arm.kind == NONE:
            return self._processor.parse_chat([{"role": "user", "content": example.question}])
        prompt = self._parse(example, wrap(example.memory) if arm.has_latents else self._text(example, arm), arm)
        if arm.kind not in MIXED:
            return prompt
        expansion = Expansion(share=Fraction(1, 2 * arm.chunk_size), policy=MIXED[arm.kind])
        return self._expander(prompt, expansion, example.answer)

    def _parse(self, example: Example, shown: str, arm: Arm) -> MemoryPrompt:
        """The prompt with this in the memory's place."""
        if example.question:
            return self._processor.parse_chat(example.messages(shown), arm.latent_size)
        return self._processor.parse_raw(shown, arm.latent_size)

    def _text(self, example: Example, arm: Arm) -> str:
        """What an arm without latents shows."""
        if arm.kind == FULL:
            return example.memory
        ids = self._ids(example)
        budget = num_latents(len(ids), arm.chunk_size)
        if arm.kind == TRUNCATED:
            return self._processor.tokenizers.encoder.decode(ids[:budget])
        span = self._processor.parse_raw(wrap(example.memory)).spans[0]
        memory = MemoryText.of(span, self._processor.tokenizers.encoder)
        (ranges,) = select([memory], Question(example.question), Expansion(tokens=budget))
        return "".join(memory.text[begin:end] for begin, end in ranges)

    def _ids(self, example: Example) -> list[int]:
        return self._processor.tokenizers.encoder(example.memory, add_special_tokens=False)["input_ids"]
