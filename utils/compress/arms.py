"""The arms of an evaluation: what a decoder reads in a memory's place, on the same examples, under one budget of rows.

    none           nothing: the question alone
    full           the whole text
    memory@4       latents at chunk size 4
    truncated@4    text: as many tokens of its beginning
    bm25@4         text: as many tokens of the lines that BM25 selects
    expand@4       half as many latents, at chunk size 8, and the other half of the rows text that BM25 selects
    random@4       the same, selected by chance
    answer@4       the same, selected by the answer: what a perfect selector would reach

All arms at one chunk size have the same budget of decoder rows for a memory. `utils.training.evaluate` and `ruler run`
share these arms and their names; `arm_prompts.py` makes their prompts. Loads no library: a command's `--help` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.model.config import CompressionConfig

NONE, FULL, MEMORY, TRUNCATED, BM25 = "none", "full", "memory", "truncated", "bm25"
# Arm → the policy that selects its text.
MIXED = {"expand": "bm25", "random": "random", "answer": "answer"}
KINDS = (NONE, FULL, MEMORY, TRUNCATED, BM25, *MIXED)
# What `all` means. Only an evaluation that asks for it selects by the answer.
ALL = tuple(kind for kind in KINDS if kind != "answer")
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


def find_arms(text: str, chunk_sizes: Sequence[int], kinds: Sequence[str] = KINDS) -> list[Arm]:
    """The arms that a flag names, at these chunk sizes.

    Args:
        text: Kinds with commas between them; `all` stands for `ALL`.
        chunk_sizes: Of the arms with a budget.
        kinds: Those that can be asked for.

    Raises:
        ConfigError: An unknown kind, or no chunk size for a kind that needs one.
    """
    named = [kind for part in text.split(",") for kind in (ALL if part.strip() == "all" else (part.strip(),))]
    for kind in named:
        if kind not in kinds:
            raise ConfigError(f"--arms: no arm {kind!r}: choose among {', '.join(kinds)}, or all")
    sized = [kind for kind in KINDS[2:] if kind in named]
    if sized and not chunk_sizes:
        raise ConfigError(f"--arms {','.join(sized)} need a --chunk-size, such as 4,8")
    arms = [Arm(kind) for kind in (NONE, FULL) if kind in named]
    return arms + [Arm(kind, size) for size in dict.fromkeys(chunk_sizes) for kind in sized]


def check_arms(arms: Sequence[Arm], config: CompressionConfig) -> None:
    """See that a pair can serve the chunk sizes of the arms' latents.

    Raises:
        ConfigError: It cannot, or it was not trained for those of a mixed arm.
    """
    for arm in arms:
        config.with_chunk_size(arm.latent_size)
        if arm.kind in MIXED and config.chunk_sizes and arm.latent_size not in config.chunk_sizes:
            raise ConfigError(
                f"{arm.name} has latents at chunk size {arm.latent_size}, the pair was trained for "
                f"{', '.join(map(str, config.chunk_sizes))}: choose smaller ones with --chunk-size, or other --arms"
            )
