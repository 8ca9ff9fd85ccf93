"""Requests for a backend that reads nothing but text: of the memory, the text that the question needs.

    requests = TextRequests(TextSelector.load(None), memories, settings)
    compressed = await requests.compress(CHAT, raw, owner)

What is left out is named in its place: `[… 412 tokens left out …]`, with the line end that it had. A stretch that this
would not shorten stays. All of the memory goes where the budget covers it, or where nothing is asked to select by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import orjson

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import load_tokenizers
from utils.checkpoint.locate import find_checkpoint
from utils.compress.policies.registry import POLICIES
from utils.compress.select import Expansion, MemoryText, Question, select
from utils.errors import ConfigError
from utils.model.expand import CharRange
from utils.model.processor import Processor
from utils.model.prompt import MemoryLimit, MemoryPrompt
from utils.serving.api_error import ApiError
from utils.serving.memories import MemoryStore
from utils.serving.read_request import ReadRequest
from utils.serving.report import SpanReport
from utils.serving.request_options import OptionsReader
from utils.serving.rewriter import CompressedRequest, Rewriter
from utils.serving.settings import GatewaySettings

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


class TextRequests(Rewriter):
    """Puts selected text in the spans' places.

    Args:
        selector: Counts tokens.
        memories: Stored texts that spans may name.
        settings: Limits, and what is selected for requests that say nothing about it.

    Raises:
        ConfigError: That leaves nothing, or needs latents.
    """

    mode = "text"

    def __init__(self, selector: TextSelector, memories: MemoryStore, settings: GatewaySettings) -> None:
        default = settings.expansion or DEFAULT
        if default.is_off or default.policy not in TEXT_POLICIES:
            raise ConfigError(
                "--backend text has no latents: it needs a budget above 0 and one of the policies "
                f"{', '.join(TEXT_POLICIES)}"
            )
        options = OptionsReader((), default, TEXT_POLICIES, auto=settings.auto_memory)
        # Other servers than vLLM know no salt, and some refuse fields that they do not know.
        super().__init__(selector, options, memories, settings, salted=False)
        self._decoder = selector.processor.tokenizers.decoder

    async def _rewrite(self, read: ReadRequest, owner: str) -> CompressedRequest:
        return await self._tokenizer.run(lambda: self._write(read))

    def _write(self, read: ReadRequest) -> CompressedRequest:
        expansion = read.options.expansion
        if expansion is None:
            raise ApiError(
                400, "the budget is 0, which leaves nothing of the memory: this gateway's backend reads text only, "
                "expected a budget above 0",
            )  # fmt: skip
        texts: list[str] = []
        reports: list[SpanReport] = []
        for prompt in self._prompts(read):
            memories = self._rows.memory_texts(prompt)
            for memory, ranges in zip(memories, self._chosen(prompt, memories, expansion), strict=True):
                texts.append(with_notes(memory, ranges))
                reports.append(self._report(memory, ranges, texts[-1]))
        if read.chat is not None:
            body = {**read.body, "messages": read.chat.fill_texts(texts)}
        else:
            body = read.with_prompts(texts)
        return self._forward(read, body, orjson.dumps(body), reports=reports)

    def _prompts(self, read: ReadRequest) -> list[MemoryPrompt]:
        """The spans of each prompt, with what it asks; a token is a row."""
        if read.chat is not None:
            return [self._rows.spans_alone(read.sources, 1, read.chat.query())]
        remaining = iter(read.sources)
        prompts = []
        for pieces in read.prompts:
            own = [next(remaining) for _ in pieces[1::2]]
            prompts.append(self._rows.spans_alone(own, 1, " ".join(pieces[::2]).strip()))
            self._rows.check_together(sum(prompt.memory_tokens for prompt in prompts))
        return prompts

    def _chosen(
        self, prompt: MemoryPrompt, memories: Sequence[MemoryText], expansion: Expansion
    ) -> list[list[CharRange]]:
        """What of each span goes to the backend."""
        asks = not POLICIES[expansion.policy].reads_query or self._rows.question(prompt, expansion) is not None
        if not asks or expansion.budget(prompt.memory_tokens) >= prompt.memory_tokens:
            return [[(0, len(memory.text))] for memory in memories]
        chosen = select(memories, Question(prompt.query), expansion)
        return [without_small_gaps(memory, ranges) for memory, ranges in zip(memories, chosen, strict=True)]

    def _report(self, memory: MemoryText, ranges: Sequence[CharRange], text: str) -> SpanReport:
        return SpanReport(
            tokens=len(memory.offsets),
            text_rows=self._num_rows(text),
            segments=[([chars], self._num_rows(memory.text[slice(*chars)])) for chars in ranges],
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
