"""A client's request body → the body for the backend, with latents where memory markers were.

compressed = await RequestCompressor(compressor, queue, memories, settings).chat(body)
compressed.body       # None: no markers, forward the client's bytes as they came
compressed.report     # what the answer says about the spans
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from utils.errors import CodeLlavaError, PromptError
from utils.inference.compressor import Compressor
from utils.inference.prompt_embeds import encode_wire
from utils.model.markers import MEMORY_END, MEMORY_START
from utils.model.prompt import MemoryPrompt, split_spans
from utils.serving.api_error import ApiError
from utils.serving.chat_parts import outline_chat
from utils.serving.encoder_queue import EncodedSpan, EncoderQueue
from utils.serving.memories import MemoryStore
from utils.serving.settings import GatewaySettings

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Body = dict[str, Any]

# A request may say {"code_llava": {"chunk_size": 16}}; the answer tells under the same name what was compressed.
EXTENSION = "code_llava"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedRequest:
    """A request ready for the backend.

    Attributes:
        body: The new body; None when the client's own goes on unchanged.
        spans: What was encoded, in order.
        fallback: The memory went as plain text, because the encoder failed.
    """

    body: Body | None
    spans: tuple[EncodedSpan, ...] = ()
    fallback: bool = False

    def report(self) -> Body:
        """The extension field of an answer."""
        tokens = sum(span.num_tokens for span in self.spans)
        latents = sum(len(span.latents_ND) for span in self.spans)
        return {
            "memory_tokens": tokens,
            "latents": latents,
            "cached_tokens": sum(span.cached_tokens for span in self.spans),
            "compression_ratio": tokens / latents if latents else None,
            "encode_milliseconds": max((round(span.milliseconds, 2) for span in self.spans), default=0.0),
            "fallback": "plain-text" if self.fallback else None,
            "spans": [span.report() for span in self.spans],
        }


class RequestCompressor:
    """Rewrites request bodies.

    Args:
        compressor: Parses and embeds.
        queue: Encodes.
        memories: Stored texts that spans may name.
        settings: Limits and the policy on failure.
    """

    def __init__(
        self, compressor: Compressor, queue: EncoderQueue, memories: MemoryStore, settings: GatewaySettings
    ) -> None:
        self._compressor = compressor
        self._queue = queue
        self._memories = memories
        self._settings = settings
        # One thread: a tokenizer must not be used by two at once, and a long text must not stop the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """End the tokenizer's thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def chat(self, body: Body) -> CompressedRequest:
        """Rewrite the body of `/v1/chat/completions`: spans become content parts.

        Raises:
            PromptError: The markers are wrong, or a span is too long.
            ApiError: Too many spans, an unknown memory, a full queue, an encoder that failed.
        """
        rest, chunk_size = self._take_options(body)
        outline = outline_chat(body.get("messages"))
        if not outline.spans:
            return CompressedRequest(body=None if rest is body else rest)
        texts = self._resolve(outline.spans)
        parsed = await self._in_thread(lambda: [self._parse_span(text, chunk_size) for text in texts])
        encoded = await self._encode(parsed)
        if encoded is None:
            parts = [{"type": "text", "text": text} for text in texts]
        else:
            parts = await self._in_thread(
                lambda: [{"type": "prompt_embeds", "data": self._wire(span.latents_ND)} for span in encoded]
            )
        return CompressedRequest(
            body={**rest, "messages": outline.fill(parts)}, spans=tuple(encoded or ()), fallback=encoded is None
        )

    async def completion(self, body: Body) -> CompressedRequest:
        """Rewrite the body of `/v1/completions`: a prompt with memory becomes rows as a whole.

        Raises:
            PromptError: As `chat`.
            ApiError: As `chat`; also 400 for a list that mixes marked texts with token ids.
        """
        if body.get("prompt_embeds") is not None:
            raise PromptError("prompt_embeds are not taken from clients: send text")
        rest, chunk_size = self._take_options(body)
        given = body.get("prompt")
        prompts = given if isinstance(given, list) else [given]
        pieces = [[*split_spans(text, "the prompt")] if isinstance(text, str) else [] for text in prompts]
        if not any(piece.is_memory for prompt in pieces for piece in prompt):
            return CompressedRequest(body=None if rest is body else rest)
        if not all(isinstance(text, str) for text in prompts):
            raise ApiError(400, "prompts with memory and prompts of token ids cannot share a request")
        names = [piece.text for prompt in pieces for piece in prompt if piece.is_memory]
        resolved = iter(self._resolve(names))
        texts = [
            [(next(resolved) if piece.is_memory else piece.text, piece.is_memory) for piece in prompt]
            for prompt in pieces
        ]
        marked = ["".join(f"{MEMORY_START}{t}{MEMORY_END}" if memory else t for t, memory in p) for p in texts]
        parsed = await self._in_thread(lambda: [self._compressor.parse_raw(text, chunk_size) for text in marked])
        encoded = await self._encode(parsed)
        if encoded is None:
            plain = ["".join(text for text, _ in prompt) for prompt in texts]
            fallback = {**rest, "prompt": plain if isinstance(given, list) else plain[0]}
            return CompressedRequest(body=fallback, fallback=True)
        rows = await self._in_thread(lambda: self._rows(parsed, encoded))
        others = {name: value for name, value in rest.items() if name != "prompt"}
        return CompressedRequest(
            body={**others, "prompt_embeds": rows if isinstance(given, list) else rows[0]}, spans=tuple(encoded)
        )

    def settings_report(self) -> Body:
        """What a client may want to know before it asks: the checkpoint and its chunk sizes."""
        files = self._compressor.files
        return {
            "checkpoint": files.root.name,
            "chunk_size": files.config.chunk_size,
            "chunk_sizes": sorted(self._chunk_sizes()),
            "max_spans": self._settings.max_spans,
        }

    def _chunk_sizes(self) -> set[int]:
        """The sizes that the checkpoint was made for: others would be answered badly without a word."""
        config = self._compressor.files.config
        return {config.chunk_size, *config.chunk_sizes}

    def _take_options(self, body: Body) -> tuple[Body, int | None]:
        """The body without our extension field (the body itself where it has none), and the chunk size asked for."""
        if EXTENSION not in body:
            return body, None
        options = body[EXTENSION]
        if not isinstance(options, dict) or options.keys() - {"chunk_size"}:
            raise ApiError(400, f'{EXTENSION} is {options!r}, expected {{"chunk_size": …}}')
        chunk_size = options.get("chunk_size")
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size not in self._chunk_sizes()):
            sizes = ", ".join(map(str, sorted(self._chunk_sizes())))
            raise ApiError(400, f"chunk_size is {chunk_size!r}, this checkpoint has {sizes}")
        return {name: value for name, value in body.items() if name != EXTENSION}, chunk_size

    def _resolve(self, spans: list[str]) -> list[str]:
        if len(spans) > self._settings.max_spans:
            raise ApiError(413, f"{len(spans)} memory spans, the limit is {self._settings.max_spans}")
        return [self._memories.resolve(span) for span in spans]

    def _parse_span(self, text: str, chunk_size: int | None) -> MemoryPrompt:
        return self._compressor.parse_raw(f"{MEMORY_START}{text}{MEMORY_END}", chunk_size)

    async def _encode(self, prompts: list[MemoryPrompt]) -> list[EncodedSpan] | None:
        """The spans of all prompts; None when the encoder failed and plain text is the policy."""
        try:
            return await self._queue.encode([span for prompt in prompts for span in prompt.spans])
        except (ApiError, CodeLlavaError):
            raise
        except Exception as error:  # out of memory, a broken device, …: whatever stops the encoder
            logger.exception("the encoder failed")
            if self._settings.on_error == "plain-text":
                return None
            raise ApiError(500, f"the encoder failed ({type(error).__name__}): nothing was sent") from None

    def _rows(self, prompts: list[MemoryPrompt], encoded: list[EncodedSpan]) -> list[str]:
        remaining = iter(encoded)
        rows = []
        for prompt in prompts:
            own = [(span.latents_ND, span.cached_tokens) for _, span in zip(prompt.spans, remaining, strict=False)]
            rows.append(encode_wire(self._compressor.embed(prompt, own).values_TD))
        return rows

    def _wire(self, latents_ND: torch.Tensor) -> str:
        return encode_wire(latents_ND, self._compressor.dtype)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
