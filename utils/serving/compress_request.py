"""A client's request body → the body for the backend, with latents where memory markers were.

compressed = await RequestCompressor(compressor, queue, memories, settings).chat(raw, owner)
compressed.content    # the bytes to forward; the client's own where there is nothing to change
compressed.report()   # what the answer says about the spans

In order: read the JSON, find the spans, count what all of it expands to, and only then encode. What cannot fit is
refused before it costs anything; long bodies are read and written beside the event loop.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from utils.compress.compressor import Compressor
from utils.compress.prompt_embeds import encode_wire
from utils.errors import CodeLlavaError, PromptError
from utils.model.markers import has_markers
from utils.model.prompt import MemoryPrompt
from utils.serving.api_error import ApiError, shown
from utils.serving.chat_parts import ChatOutline, SpanSplitter, outline_chat
from utils.serving.encoder_queue import EncodedSpan, EncoderQueue
from utils.serving.json_body import MAX_DEPTH, MAX_VALUES, read_object
from utils.serving.memories import Memory, MemoryStore
from utils.serving.off_loop import OffLoop
from utils.serving.prompt_rows import PromptRows
from utils.serving.settings import GatewaySettings

logger = logging.getLogger(__name__)
Body = dict[str, Any]

# A request may say {"code_llava": {"chunk_size": 16}}; the answer tells under the same name what was compressed.
EXTENSION = "code_llava"
# vLLM's own field: what has another salt shares no prefix cache.
_CACHE_SALT = "cache_salt"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedRequest:
    """A request ready for the backend.

    Attributes:
        content: The new body, or the client's own.
        is_ours: The request asked something of the gateway, so that the answer tells what was done.
        spans: What was encoded, in order.
        fallback: The memory went as plain text, because the encoder failed.
    """

    content: bytes
    is_ours: bool = False
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A body that was read: what is forwarded of it beside the prompt, and what its spans stand for."""

    raw: bytes
    body: Body
    is_ours: bool
    is_changed: bool
    chunk_size: int | None
    sources: list[str | Memory]

    def unchanged(self) -> CompressedRequest:
        """Forward it without memory."""
        return CompressedRequest(content=orjson.dumps(self.body) if self.is_changed else self.raw, is_ours=self.is_ours)

    def rewritten(self, spans: Sequence[EncodedSpan] | None, **fields: Any) -> CompressedRequest:
        """Forward it with other fields."""
        content = orjson.dumps({**self.body, **fields})
        return CompressedRequest(content=content, is_ours=True, spans=tuple(spans or ()), fallback=spans is None)

    @property
    def texts(self) -> list[str]:
        """What the spans stand for; together they were found to be no longer than a body."""
        return [source.text if isinstance(source, Memory) else source for source in self.sources]


class RequestCompressor:
    """Rewrites request bodies.

    Args:
        compressor: Parses and embeds.
        queue: Encodes.
        memories: Stored texts that spans may name.
        settings: Limits, keys and the policy on failure.
        is_local: The backend decodes in this process: its text is counted here, before the work begins.
    """

    def __init__(
        self,
        compressor: Compressor,
        queue: EncoderQueue,
        memories: MemoryStore,
        settings: GatewaySettings,
        is_local: bool = False,
    ) -> None:
        self._compressor = compressor
        self._queue = queue
        self._memories = memories
        self._settings = settings
        self._is_local = is_local
        self._rows = PromptRows(compressor, settings.max_request_rows)
        # A tokenizer must not be used by two threads at once, and its work must not wait for long bodies.
        self._tokenizer = OffLoop("tokenizer")
        self._bodies = OffLoop("bodies")

    def close(self) -> None:
        """End the threads."""
        self._tokenizer.close()
        self._bodies.close()

    async def chat(self, raw: bytes, owner: str = "") -> CompressedRequest:
        """Rewrite the body of `/v1/chat/completions`: spans become content parts.

        Args:
            raw: The body.
            owner: Whose memories and cache entries it may use, and what it may not share.

        Raises:
            PromptError: The markers are wrong, or a span is too long.
            ApiError: 400, a body of another shape; 413, too many spans or rows; also an unknown memory, a full queue,
                an encoder that failed.
        """
        read, outline = await self._bodies.run_if_long(len(raw), lambda: self._read_chat(raw, owner))
        parsed = await self._count_chat(read, outline)
        if not outline.spans:
            return await self._bodies.run_if_long(len(raw), read.unchanged)
        encoded = await self._encode([parsed] if parsed else [], owner)

        def write() -> CompressedRequest:
            if encoded is None:
                parts = [{"type": "text", "text": text} for text in read.texts]
            else:
                wires = (encode_wire(span.latents_ND, self._compressor.dtype) for span in encoded)
                parts = [{"type": "prompt_embeds", "data": wire} for wire in wires]
            return read.rewritten(encoded, messages=outline.fill(parts))

        return await self._tokenizer.run(write)

    async def completion(self, raw: bytes, owner: str = "") -> CompressedRequest:
        """Rewrite the body of `/v1/completions`: a prompt with memory becomes rows as a whole.

        Raises:
            PromptError: As `chat`.
            ApiError: As `chat`; also 400 for a list that mixes marked texts with token ids.
        """
        read, prompts = await self._bodies.run_if_long(len(raw), lambda: self._read_completion(raw, owner))
        is_list = isinstance(read.body.get("prompt"), list)
        if not read.sources:
            if self._is_local:
                await self._tokenizer.run(lambda: self._count_plain(read.body.get("prompt")))
            return await self._bodies.run_if_long(len(raw), read.unchanged)
        parsed = await self._tokenizer.run(lambda: self._parse_prompts(read, prompts))
        encoded = await self._encode(parsed, owner)

        def write() -> CompressedRequest:
            if encoded is None:
                texts = iter(read.texts)
                plain = [
                    "".join(next(texts) if place % 2 else text for place, text in enumerate(pieces))
                    for pieces in prompts
                ]
                return read.rewritten(None, prompt=plain if is_list else plain[0])
            rows = self._embed(parsed, encoded)
            others = replace(read, body={name: value for name, value in read.body.items() if name != "prompt"})
            return others.rewritten(encoded, prompt_embeds=rows if is_list else rows[0])

        return await self._tokenizer.run(write)

    def settings_report(self) -> Body:
        """What a client may want to know before it asks: the checkpoint, its chunk sizes and the limits."""
        files, settings = self._compressor.files, self._settings
        return {
            "checkpoint": files.root.name,
            "chunk_size": files.config.chunk_size,
            "chunk_sizes": sorted(self._chunk_sizes()),
            "max_spans": settings.max_spans,
            "limits": {
                "body_bytes": settings.max_body_bytes,
                "body_values": MAX_VALUES,
                "body_depth": MAX_DEPTH,
                "spans": settings.max_spans,
                "prompt_rows": self._rows.max_prompt_rows,
                "request_rows": self._rows.max_request_rows,
                "waiting_requests": settings.max_waiting,
                "memories": self._memories.max_count,
                "memories_bytes": self._memories.max_bytes,
                "memory_ttl_seconds": self._memories.ttl_s,
            },
        }

    def _chunk_sizes(self) -> set[int]:
        """The sizes that the checkpoint was made for: others would be answered badly without a word."""
        config = self._compressor.files.config
        return {config.chunk_size, *config.chunk_sizes}

    def _read_chat(self, raw: bytes, owner: str) -> tuple[_Read, ChatOutline]:
        body = read_object(raw)
        if self._is_local and isinstance(body.get("messages"), list):
            self._rows.check_count(len(body["messages"]), "the chat, at one row a message or more")
        outline = outline_chat(body.get("messages"), self._settings.max_spans)
        return self._read(raw, body, owner, outline.spans), outline

    def _read_completion(self, raw: bytes, owner: str) -> tuple[_Read, list[list[str]]]:
        """The body, and each prompt's texts and spans in turns: a text first and last."""
        body = read_object(raw)
        if body.get("prompt_embeds") is not None:
            raise PromptError("prompt_embeds are not taken from clients: send text")
        given = body.get("prompt")
        prompts = given if isinstance(given, list) else [given]
        texts = [text for text in prompts if isinstance(text, str)]
        if not any(map(has_markers, texts)):
            return self._read(raw, body, owner, []), []
        if len(texts) < len(prompts):
            raise ApiError(400, "prompts with memory and prompts of token ids cannot share a request")
        self._rows.check_together(len(texts))
        splitter = SpanSplitter(self._settings.max_spans)
        pieces = [splitter.split(text, "the prompt") for text in texts]
        spans = [piece.text for prompt in pieces for piece in prompt if piece.is_memory]
        return self._read(raw, body, owner, spans), [[piece.text for piece in prompt] for prompt in pieces]

    def _read(self, raw: bytes, body: Body, owner: str, spans: Sequence[str]) -> _Read:
        chunk_size = self._chunk_size(body)
        sources = [self._memories.resolve(span, owner) or span for span in spans]
        num_bytes = len(raw) + sum(source.size_bytes for source in sources if isinstance(source, Memory))
        if num_bytes > self._settings.max_body_bytes:
            raise ApiError(
                413, f"with the stored texts that it names the body has {num_bytes} bytes, the limit is "
                f"{self._settings.max_body_bytes}",
            )  # fmt: skip
        salt = {_CACHE_SALT: _cache_salt(owner, body.get(_CACHE_SALT))} if owner and not self._is_local else {}
        return _Read(
            raw=raw,
            body={name: value for name, value in body.items() if name != EXTENSION} | salt,
            is_ours=EXTENSION in body,
            is_changed=EXTENSION in body or bool(salt),
            chunk_size=chunk_size,
            sources=sources,
        )

    def _chunk_size(self, body: Body) -> int | None:
        """The chunk size that a request asks for."""
        options = body.get(EXTENSION, {})
        if not isinstance(options, dict) or options.keys() - {"chunk_size"}:
            raise ApiError(400, f'{EXTENSION} is {shown(options)}, expected {{"chunk_size": …}}')
        chunk_size = options.get("chunk_size")
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size not in self._chunk_sizes()):
            sizes = ", ".join(map(str, sorted(self._chunk_sizes())))
            raise ApiError(400, f"chunk_size is {shown(chunk_size)}, this checkpoint has {sizes}")
        return chunk_size

    async def _count_chat(self, read: _Read, outline: ChatOutline) -> MemoryPrompt | None:
        """The chat's spans where it has any; a chat that cannot fit is refused."""
        if self._is_local:
            latents = [{"type": "prompt_embeds", "data": ""}] * len(outline.spans)
            return await self._tokenizer.run(
                lambda: self._rows.chat(outline.fill(latents), read.sources, read.chunk_size)
            )
        if not outline.spans:
            return None
        return await self._tokenizer.run(lambda: self._rows.spans_alone(read.sources, read.chunk_size))

    def _count_plain(self, prompt: Any) -> None:
        """Refuse a completion without memory that cannot fit; what the backend refuses anyway is left to it."""
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if isinstance(prompt, str):
            self._rows.raw([prompt], [], None)
        elif isinstance(prompt, list):
            self._rows.check_count(len(prompt))

    def _parse_prompts(self, read: _Read, prompts: list[list[str]]) -> list[MemoryPrompt]:
        sources = iter(read.sources)
        parsed: list[MemoryPrompt] = []
        num_rows = 0
        for pieces in prompts:
            own = [next(sources) for _ in pieces[1::2]]
            parsed.append(self._rows.raw(pieces[::2], own, read.chunk_size))
            num_rows += len(parsed[-1].input_ids)
            self._rows.check_together(num_rows)
        return parsed

    async def _encode(self, prompts: Sequence[MemoryPrompt], owner: str) -> list[EncodedSpan] | None:
        """The spans of all prompts; None when the encoder failed and plain text is the policy."""
        try:
            return await self._queue.encode([span for prompt in prompts for span in prompt.spans], owner.encode())
        except (ApiError, CodeLlavaError):
            raise
        except Exception as error:  # out of memory, a broken device, …: whatever stops the encoder
            logger.exception("the encoder failed")
            if self._settings.on_error == "plain-text":
                return None
            raise ApiError(500, f"the encoder failed ({type(error).__name__}): nothing was sent") from None

    def _embed(self, prompts: list[MemoryPrompt], encoded: list[EncodedSpan]) -> list[str]:
        remaining = iter(encoded)
        rows = []
        for prompt in prompts:
            own = [(span.latents_ND, span.cached_tokens) for _, span in zip(prompt.spans, remaining, strict=False)]
            rows.append(encode_wire(self._compressor.embed(prompt, own).values_TD))
        return rows


def _cache_salt(owner: str, given: Any) -> str:
    """A salt that no other key's requests have, whatever salt they send."""
    if given is not None and not isinstance(given, str):
        raise ApiError(400, f"{_CACHE_SALT} is {shown(given)}, expected a text")
    return hashlib.sha256(f"{owner} {given or ''}".encode()).hexdigest()
