"""Of a memory the text that a question needs, for whoever reads text only; no latents, no weights.

    selected = SelectedText(rows, decoder_tokenizer)
    for part in selected.choose(prompt, Expansion(tokens=256)):
        part.text()                                        # "…", [… 412 tokens left out …], "…"

What is left out is named in its place, with the line end that it had. A stretch that this would not shorten stays. All
of the memory stays where the budget covers it, or where nothing is asked to select by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import load_tokenizers
from utils.checkpoint.locate import find_checkpoint
from utils.compress.policies.registry import POLICIES
from utils.compress.select import Expansion, MemoryText, Question, select
from utils.errors import ConfigError
from utils.model.expand import CharRange
from utils.model.processor import Processor
from utils.model.prompt import MemoryLimit, MemoryPrompt
from utils.serving.prompt_rows import PromptRows
from utils.serving.report import SpanReport

# Without an encoder there are no latents to select by, and "none" would leave nothing.
TEXT_POLICIES = ("bm25", "random", "all")
DEFAULT = Expansion(share=Fraction(1, 8))
# About what a note costs.
_NOTE_TOKENS = 12


@dataclass(frozen=True)
class TextSelector:
    """What selecting needs of a checkpoint: its tokenizers, which count; see `PromptParser`."""

    files: CheckpointFiles
    processor: Processor
    # The backend's model is another one, which judges what it can read by itself.
    max_positions: int | None = None

    @classmethod
    def load(cls, checkpoint: str | Path | None = None, limit: MemoryLimit | None = None) -> TextSelector:
        """Load a checkpoint's tokenizers; no weights.

        Args:
            checkpoint: Folder or hub id; None for the embedded default.
            limit: Longest allowed span.

        Raises:
            CheckpointError: The checkpoint is missing or incomplete.
            ConfigError: The limit truncates: what is left out must have been selected.
        """
        if limit is not None and limit.truncate:
            raise ConfigError("--backend text selects what is left out of a long memory: leave --truncate-memory out")
        files = find_checkpoint(checkpoint)
        return cls(files, Processor(tokenizers=load_tokenizers(files), chunk_size=1, limit=limit))


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedPart:
    """What stays of one span.

    Attributes:
        memory: The span.
        ranges: Its characters that stay.
    """

    memory: MemoryText
    ranges: Sequence[CharRange]

    @property
    def num_left_out(self) -> int:
        """Encoder tokens that do not stay."""
        return sum(_num_tokens(self.memory, gap) for gap in _gaps(self.memory, self.ranges))

    def text(self, retrieve_id: str | None = None) -> str:
        """What stays, with notes in the places of the rest.

        Args:
            retrieve_id: Under which the whole text can be had; where something is left out, the end tells it.
        """
        text = with_notes(self.memory, self.ranges)
        if retrieve_id is None or not self.num_left_out:
            return text
        line_end = "" if text.endswith("\n") else "\n"
        total = len(self.memory.offsets)
        return f"{text}{line_end}[compressed: {self.num_left_out} of {total} tokens left out, hash={retrieve_id}]\n"


class SelectedText:
    """Selects with one checkpoint's tokenizers, in the thread that they are used in.

    Args:
        rows: Of a `TextSelector`: a token is a row.
        decoder: The decoder's tokenizer, which counts what stays.
    """

    def __init__(self, rows: PromptRows, decoder: Any) -> None:
        self.rows = rows
        self._decoder = decoder

    def choose(self, prompt: MemoryPrompt, expansion: Expansion) -> list[SelectedPart]:
        """What stays of each span of a prompt.

        Raises:
            ApiError: 400, the encoder's tokenizer cannot; 413, the question is too long.
        """
        memories = self.rows.memory_texts(prompt)
        asks = not POLICIES[expansion.policy].reads_query or self.rows.question(prompt, expansion) is not None
        if not asks or expansion.budget(prompt.memory_tokens) >= prompt.memory_tokens:
            return [SelectedPart(memory=memory, ranges=[(0, len(memory.text))]) for memory in memories]
        chosen = select(memories, Question(prompt.query), expansion)
        return [
            SelectedPart(memory=memory, ranges=without_small_gaps(memory, ranges))
            for memory, ranges in zip(memories, chosen, strict=True)
        ]

    def report(self, part: SelectedPart, text: str) -> SpanReport:
        """What an answer tells about a part that is read as `text`."""
        return SpanReport(
            tokens=len(part.memory.offsets),
            text_rows=self._num_rows(text),
            segments=[([chars], self._num_rows(part.memory.text[slice(*chars)])) for chars in part.ranges],
        )

    def _num_rows(self, text: str) -> int:
        return len(self._decoder(text, add_special_tokens=False)["input_ids"])


def without_small_gaps(memory: MemoryText, ranges: Sequence[CharRange]) -> list[CharRange]:
    """The ranges, with those stretches between and around them that a note in their place would not shorten."""
    small = [gap for gap in _gaps(memory, ranges) if _num_tokens(memory, gap) <= _NOTE_TOKENS]
    joined: list[CharRange] = []
    for begin, end in sorted([*ranges, *small]):
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def with_notes(memory: MemoryText, ranges: Sequence[CharRange]) -> str:
    """The text of the ranges, and notes in the places of the rest."""
    pieces = {begin: memory.text[begin:end] for begin, end in ranges}
    for gap in _gaps(memory, ranges):
        line_end = "\n" if memory.text[slice(*gap)].endswith("\n") else ""
        pieces[gap[0]] = f"[… {_num_tokens(memory, gap)} tokens left out …]{line_end}"
    return "".join(pieces[begin] for begin in sorted(pieces))


def _gaps(memory: MemoryText, ranges: Sequence[CharRange]) -> list[CharRange]:
    begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
    return [gap for gap in zip([0, *ends], [*begins, len(memory.text)], strict=True) if gap[0] < gap[1]]


def _num_tokens(memory: MemoryText, chars: CharRange) -> int:
    """Encoder tokens that begin in a range."""
    first, stop = np.searchsorted(memory.offsets[:, 0], chars)
    return int(stop - first)
