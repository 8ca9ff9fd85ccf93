"""Prompts tokenised, and what they expand to counted, before anything is encoded: 413 where it cannot fit.

    prompt = PromptRows(compressor).raw(["Explain ", "."], ["def f(): …"], chunk_size=None)

Everything here runs in the tokenizer's thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from utils.compress.expander import Expander
from utils.compress.select import Expansion, MemoryText
from utils.errors import ConfigError
from utils.model.chat import chat_ids, chat_query
from utils.model.markers import PLACEHOLDER
from utils.model.prompt import MemoryPrompt, MemorySpan, num_latents, place_spans
from utils.serving.api_error import ApiError
from utils.serving.bounded_tokenizer import first_ids, first_part, ids_within
from utils.serving.memories import Memory

if TYPE_CHECKING:
    import torch

    from utils.checkpoint.layout import CheckpointFiles
    from utils.model.processor import Processor

ONE_PROMPT = "the local backend takes one prompt a request: a text that is not empty, or token ids"
# A decoder that does not say how many positions it has.
_NO_LIMIT = 1 << 20


class PromptParser(Protocol):
    """What parsing needs of a checkpoint, such as a `Compressor` has it."""

    @property
    def files(self) -> CheckpointFiles:
        """The checkpoint."""
        ...

    @property
    def processor(self) -> Processor:
        """Its tokenizers, and the longest allowed span."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Longest prompt in rows; None where nobody says."""
        ...


class PromptRows:
    """Parses prompts whose rows fit.

    Args:
        parser: Tokenizers, limits and the decoder's positions.
        max_request_rows: Most rows of all prompts of one request; None: four times the positions.
        remembers: A stored text is tokenised once. Not for a second reader with other limits, which go into the ids.
    """

    def __init__(self, parser: PromptParser, max_request_rows: int | None = None, *, remembers: bool = True) -> None:
        processor = parser.processor
        config = parser.files.config
        self.max_prompt_rows = parser.max_positions or _NO_LIMIT
        self.max_request_rows = max_request_rows or 4 * self.max_prompt_rows
        self._chunk_size = config.chunk_size
        self._limit = processor.limit
        self._tokenizers = processor.tokenizers
        # As `memory_ids` reads memories.
        self._encoder = partial(processor.tokenizers.encoder, split_special_tokens=True)
        self._characters = partial(processor.tokenizers.decoder, split_special_tokens=True)
        self._expander = Expander(processor.tokenizers)
        self._remembers = remembers
        self._has_positions = parser.max_positions is not None
        # More tokens than this are in no prompt, whatever its chunk size.
        largest = max(config.chunk_size, *config.chunk_sizes, 1) if self._has_positions else 1
        self._most_tokens = self.max_prompt_rows * largest

    def spans_alone(self, sources: Sequence[str | Memory], chunk_size: int | None, query: str = "") -> MemoryPrompt:
        """A prompt of nothing but the spans: for a backend that counts the text around them itself.

        Args:
            sources: The spans.
            chunk_size: Encoder tokens per latent; None for the checkpoint's own.
            query: What is asked about them.

        Raises:
            ApiError: 413, it needs more rows than the decoder has positions.
            PromptError: A span is empty or over its limit.
        """
        marks = self._tokenizers.markers
        return self._place([marks.start, marks.memory, marks.end] * len(sources), sources, chunk_size, query)

    def raw(self, texts: Sequence[str], sources: Sequence[str | Memory], chunk_size: int | None) -> MemoryPrompt:
        """One text; `texts` are what stands before, between and after its spans.

        Raises:
            ApiError, PromptError: As `spans_alone`.
        """
        ids = self._text_ids(PLACEHOLDER.join(texts), special_tokens=True)
        return self._place(ids, sources, chunk_size, " ".join(texts).strip())

    def chat(
        self, messages: list[dict[str, Any]], sources: Sequence[str | Memory], chunk_size: int | None
    ) -> MemoryPrompt:
        """A chat as the decoder in this process reads it.

        Args:
            messages: With texts as contents, in which each span is a placeholder between its markers.
            sources: The spans.
            chunk_size: Encoder tokens per latent; None for the checkpoint's own.

        Raises:
            ApiError, PromptError: As `spans_alone`; also messages that the chat template refuses.
        """
        ids = chat_ids(messages, self._tokenizers.decoder, self._text_ids)
        self.check_count(len(ids), "the text outside the memory")
        return self._place(ids, sources, chunk_size, chat_query(messages))

    def plain(self, prompt: Any) -> MemoryPrompt:
        """The only prompt of a completion without memory: a text, or a list of token ids.

        Raises:
            ApiError: 400, it is something else; 413, as `spans_alone`.
        """
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if prompt and isinstance(prompt, str):
            return self.raw([prompt], [], None)
        if prompt and isinstance(prompt, list):
            self.check_count(len(prompt))
            if all(type(token) is int and token >= 0 for token in prompt):
                return MemoryPrompt(input_ids=prompt, spans=())
        raise ApiError(400, ONE_PROMPT)

    def characters(self, text: str) -> list[int]:
        """A text in the decoder's ids, control tokens as the characters that they are written with.

        Raises:
            ApiError: 413, it has more rows than the decoder has positions.
        """
        ids = ids_within(self._characters, text, self.max_prompt_rows)
        if ids is None:
            raise self._too_long("a text outside the memory")
        return ids

    def question(self, prompt: MemoryPrompt, expansion: Expansion) -> MemorySpan | None:
        """What a prompt's memory is selected by, as a span that can be encoded; None where nothing is asked.

        Raises:
            ApiError: 413, it is longer than the decoder's positions.
        """
        query = prompt.query if expansion.query is None else expansion.query
        ids = ids_within(self._encoder, query, self.max_prompt_rows) if query.strip() else []
        if ids is None:
            raise self._too_long("the question to select by (expand_query sets a shorter one)")
        size = prompt.spans[0].chunk_size if prompt.spans else self._chunk_size
        stop = num_latents(max(1, len(ids)), size)
        return MemorySpan(text=query, token_ids=ids, start=0, stop=stop, chunk_size=size) if ids else None

    def expand(
        self,
        prompts: Sequence[MemoryPrompt],
        expansion: Expansion,
        latents: Sequence[Sequence[torch.Tensor]] | None = None,
    ) -> list[MemoryPrompt]:
        """The prompts with text in place of some of their latents.

        Args:
            prompts: Parsed; each has the whole budget for itself.
            expansion: Budget and policy.
            latents: For the policy `latents`: of each prompt with memory those of its question and its spans.

        Raises:
            ApiError: 400, the encoder's tokenizer cannot; 413, the text does not fit.
        """
        each = latents or [()] * len(prompts)
        wider = [self._expand(prompt, expansion, own) for prompt, own in zip(prompts, each, strict=True)]
        self.check_together(sum(len(prompt.input_ids) for prompt in wider))
        return wider

    def memory_texts(self, prompt: MemoryPrompt) -> list[MemoryText]:
        """The spans as selection sees them.

        Raises:
            ApiError: 400, the encoder's tokenizer cannot tell which characters a token stands for.
        """
        try:
            return [MemoryText.of(span, self._tokenizers.encoder) for span in self._as_encoded(prompt).spans]
        except ConfigError as error:
            raise ApiError(400, str(error)) from None

    def num_rows(self, texts: Sequence[str]) -> int:
        """Rows of texts outside the memory.

        Raises:
            ApiError: 413, more than the decoder has positions.
        """
        num_rows = 0
        for text in texts:
            num_rows += len(self._text_ids(text))
            self.check_count(num_rows, "the text outside the memory")
        return num_rows

    def check_count(self, num_rows: int, what: str = "the prompt") -> None:
        """Refuse a prompt of too many rows."""
        if num_rows > self.max_prompt_rows:
            raise self._too_long(what, num_rows)

    def check_together(self, num_rows: int) -> None:
        """Refuse a request whose prompts together have too many rows."""
        if num_rows > self.max_request_rows:
            raise ApiError(
                413, f"the request's prompts need {num_rows} rows together or more, the limit is "
                f"{self.max_request_rows}: send fewer at once",
            )  # fmt: skip

    def _text_ids(self, text: str, *, special_tokens: bool = False) -> list[int]:
        ids = ids_within(self._tokenizers.decoder, text, self.max_prompt_rows, special_tokens=special_tokens)
        if ids is None:
            raise self._too_long("the text outside the memory")
        return ids

    def _expand(self, prompt: MemoryPrompt, expansion: Expansion, latents: Sequence[torch.Tensor]) -> MemoryPrompt:
        try:
            wider = self._expander(self._as_encoded(prompt), expansion, encode=lambda _: latents)
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        self.check_count(len(wider.input_ids), "the prompt with text in place of latents")
        return wider

    def _as_encoded(self, prompt: MemoryPrompt) -> MemoryPrompt:
        """The prompt with spans that end where their tokens do: what the limit on a span cut off is not selected."""
        limit = self._limit
        if limit is None or not limit.truncate or limit.max_tokens is None:
            return prompt
        spans = [
            replace(span, text=first_part(self._encoder, span.text, limit.max_tokens), truncated_tokens=1)
            if len(span.token_ids) == limit.max_tokens
            else span
            for span in prompt.spans
        ]
        return replace(prompt, spans=tuple(spans))

    def _place(
        self, ids: list[int], sources: Sequence[str | Memory], chunk_size: int | None, query: str
    ) -> MemoryPrompt:
        size = chunk_size or self._chunk_size
        # Each span has one placeholder in the ids.
        room = self.max_prompt_rows - (len(ids) - len(sources))
        taken = 0
        token_ids: list[array[int]] = []
        texts: list[str] = []
        for number, source in enumerate(sources):
            # One latent at least for each span that is still to come.
            left = room - taken - (len(sources) - number - 1)
            most = max(0, left) * size
            tokens = self._tokens(source, most)
            if tokens is None or len(tokens) > most:
                raise self._too_long(f"{len(sources)} memory spans and what stands around them")
            taken += num_latents(max(1, len(tokens)), size)
            token_ids.append(tokens)
            texts.append(source.text if isinstance(source, Memory) else source)
        self.check_count(self.max_prompt_rows - room + taken)
        placed = place_spans(ids, texts, token_ids, self._tokenizers.markers, size, self._limit)
        return replace(placed, query=query)

    def _tokens(self, source: str | Memory, most: int) -> array[int] | None:
        """A span's encoder tokens; of one of more than `most` perhaps None."""
        if not isinstance(source, Memory):
            return self._encoder_ids(source, most)
        if not self._remembers:
            return self._encoder_ids(source.text, most)
        if source.token_ids is None and not source.is_too_long:
            source.token_ids = self._encoder_ids(source.text, self._most_tokens)
            source.is_too_long = source.token_ids is None
        return source.token_ids

    def _encoder_ids(self, text: str, most: int) -> array[int] | None:
        limit, encoder = self._limit, self._encoder
        if limit is not None and limit.truncate and limit.max_tokens is not None:
            return array("I", first_ids(encoder, text, limit.max_tokens)[: limit.max_tokens])
        ids = ids_within(encoder, text, most)
        return None if ids is None else array("I", ids)

    def _too_long(self, what: str, num_rows: int | None = None) -> ApiError:
        count = f"{num_rows} rows" if num_rows else f"more than {self.max_prompt_rows} rows"
        if not self._has_positions:
            return ApiError(413, f"{what}: {count}, which is the limit: shorten the text or the memory")
        return ApiError(
            413, f"{what}: {count}, but the decoder has {self.max_prompt_rows} positions: compress more (a larger "
            "chunk_size), or shorten the text or the memory",
        )  # fmt: skip
