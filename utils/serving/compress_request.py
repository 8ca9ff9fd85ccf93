"""A client's request body → the body for the backend, with latents where memory markers were.

    compressed = await requests.compress(CHAT, raw, owner)
    compressed.content    # the bytes to forward; the client's own where there is nothing to change
    compressed.report()   # what the answer says about the spans

In order: read the JSON, find the spans, count what all of it expands to, and only then encode. What cannot fit is
refused before it costs anything; long bodies are read and written beside the event loop.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from utils.compress.compressor import Compressor
from utils.compress.prompt_embeds import encode_wire
from utils.errors import CodeLlavaError, PromptError
from utils.model.markers import PLACEHOLDER, has_markers
from utils.model.prompt import MemoryPrompt
from utils.serving.api_error import ApiError, shown
from utils.serving.chat_parts import ChatOutline, SpanSplitter, outline_chat
from utils.serving.encoder_queue import EncodedSpan, EncoderQueue
from utils.serving.json_body import MAX_DEPTH, MAX_VALUES, read_object
from utils.serving.memories import Memory, MemoryStore
from utils.serving.off_loop import OffLoop
from utils.serving.prompt_rows import ONE_PROMPT, PromptRows
from utils.serving.settings import GatewaySettings

logger = logging.getLogger(__name__)
Body = dict[str, Any]

CHAT, COMPLETIONS = "/chat/completions", "/completions"

# A request may say {"code_llava": {"chunk_size": 16}}; the answer tells under the same name what was compressed.
EXTENSION = "code_llava"
# vLLM's own field: what has another salt shares no prefix cache.
_CACHE_SALT = "cache_salt"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedRequest:
    """A request ready for the backend.

    Attributes:
        path: Its endpoint.
        body: The client's fields, less what is the gateway's own.
        content: The body as a server gets it: a new one, or the client's own bytes.
        prompts: The same for a decoder in this process: ids whose placeholders `spans` fill.
        is_ours: The request asked something of the gateway, so that the answer tells what was done.
        spans: What was encoded, in order.
        fallback: The memory went as plain text, because the encoder failed.
    """

    path: str
    body: Body
    content: bytes = b""
    prompts: Sequence[MemoryPrompt] = ()
    is_ours: bool = False
    spans: Sequence[EncodedSpan] = ()
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
    """A body that was read: its fields, and where its spans are.

    Attributes:
        chat: A chat's messages; None for a completion.
        prompts: A completion's marked prompts, each as texts and spans in turns: a text first and last.
        sources: What the spans stand for; together no longer than a body.
    """

    path: str
    raw: bytes
    body: Body
    is_ours: bool
    is_changed: bool
    chunk_size: int | None
    chat: ChatOutline | None
    prompts: list[list[str]]
    sources: list[str | Memory]

    def unchanged(self) -> CompressedRequest:
        """Forward it without memory."""
        content = orjson.dumps(self.body) if self.is_changed else self.raw
        return CompressedRequest(path=self.path, body=self.body, content=content, is_ours=self.is_ours)

    def with_plain_text(self) -> Body:
        """The body with its memory as text."""
        texts = [source.text if isinstance(source, Memory) else source for source in self.sources]
        if self.chat is not None:
            return {**self.body, "messages": self.chat.fill([{"type": "text", "text": text} for text in texts])}
        remaining = iter(texts)
        plain = [
            "".join(next(remaining) if place % 2 else text for place, text in enumerate(pieces))
            for pieces in self.prompts
        ]
        return {**self.body, "prompt": plain if isinstance(self.body["prompt"], list) else plain[0]}


class RequestCompressor:
    """Rewrites request bodies.

    Args:
        compressor: Parses and embeds.
        queue: Encodes.
        memories: Stored texts that spans may name.
        settings: Limits, keys and the policy on failure.
        is_local: The backend decodes in this process: its text is parsed here, too, once and before the work begins.
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

    async def compress(self, path: str, raw: bytes, owner: str = "") -> CompressedRequest:
        """Rewrite a body: a chat's spans become content parts, a completion's prompt with memory becomes rows.

        Args:
            path: The endpoint, `CHAT` or `COMPLETIONS`.
            raw: The body.
            owner: Whose memories and cache entries it may use, and what it may not share.

        Raises:
            PromptError: The markers are wrong, or a span is too long.
            ApiError: 400, a body of another shape; 413, too many spans or rows; also an unknown memory, a full queue,
                an encoder that failed.
        """
        read = await self._bodies.run_if_long(len(raw), lambda: self._read(path, raw, owner))
        if not (read.sources or self._is_local):
            return await self._bodies.run_if_long(len(raw), read.unchanged)
        prompts = await self._tokenizer.run(lambda: self._parse(read))
        spans = await self._encode(prompts, owner) if read.sources else []
        return await self._tokenizer.run(lambda: self._write(read, prompts, spans))

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

    def _read(self, path: str, raw: bytes, owner: str) -> _Read:
        body = read_object(raw)
        chat, prompts = None, []
        if path == CHAT:
            if self._is_local and isinstance(body.get("messages"), list):
                self._rows.check_count(len(body["messages"]), "the chat, at one row a message or more")
            chat = outline_chat(body.get("messages"), self._settings.max_spans)
            spans = chat.spans
        else:
            prompts = self._marked_prompts(body)
            spans = [span for pieces in prompts for span in pieces[1::2]]
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
            path=path,
            raw=raw,
            body={name: value for name, value in body.items() if name != EXTENSION} | salt,
            is_ours=EXTENSION in body or bool(sources),
            is_changed=EXTENSION in body or bool(salt),
            chunk_size=chunk_size,
            chat=chat,
            prompts=prompts,
            sources=sources,
        )

    def _marked_prompts(self, body: Body) -> list[list[str]]:
        """A completion's prompts as texts and spans in turns; none where no prompt has memory."""
        if body.get("prompt_embeds") is not None:
            raise PromptError("prompt_embeds are not taken from clients: send text")
        given = body.get("prompt")
        prompts = given if isinstance(given, list) else [given]
        texts = [text for text in prompts if isinstance(text, str)]
        if not any(map(has_markers, texts)):
            return []
        if len(texts) < len(prompts):
            raise ApiError(400, "prompts with memory and prompts of token ids cannot share a request")
        self._rows.check_together(len(texts))
        splitter = SpanSplitter(self._settings.max_spans)
        return [[piece.text for piece in splitter.split(text, "the prompt")] for text in texts]

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

    def _parse(self, read: _Read) -> list[MemoryPrompt]:
        """What the backend will read, or of a server's chat the spans alone; what cannot fit is refused."""
        rows, size = self._rows, read.chunk_size
        if read.chat is not None and self._is_local:
            return [rows.chat(read.chat.flat([PLACEHOLDER] * len(read.sources)), read.sources, size)]
        if read.chat is not None:
            return [rows.spans_alone(read.sources, size)]
        if not read.sources:
            return [rows.plain(read.body.get("prompt"))]
        remaining = iter(read.sources)
        parsed: list[MemoryPrompt] = []
        num_rows = 0
        for pieces in read.prompts:
            own = [next(remaining) for _ in pieces[1::2]]
            parsed.append(rows.raw(pieces[::2], own, size))
            num_rows += len(parsed[-1].input_ids)
            rows.check_together(num_rows)
        if self._is_local and len(parsed) > 1:
            raise ApiError(400, ONE_PROMPT)
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

    def _write(
        self, read: _Read, prompts: Sequence[MemoryPrompt], spans: Sequence[EncodedSpan] | None
    ) -> CompressedRequest:
        """The request as the backend takes it; without spans the encoder has failed."""
        if spans is not None:
            body = read.body if self._is_local else self._with_latents(read, prompts, spans)
        else:
            body = read.with_plain_text()
            if self._is_local and read.chat is not None:
                prompts = [self._rows.chat(outline_chat(body["messages"]).flat([]), [], None)]
            elif self._is_local:
                prompts = [self._rows.plain(body["prompt"])]
        return CompressedRequest(
            path=read.path,
            body=body,
            content=b"" if self._is_local else orjson.dumps(body),
            prompts=prompts,
            is_ours=read.is_ours,
            spans=spans or (),
            fallback=spans is None,
        )

    def _with_latents(self, read: _Read, prompts: Sequence[MemoryPrompt], spans: Sequence[EncodedSpan]) -> Body:
        if read.chat is not None:
            wires = (encode_wire(span.latents_ND, self._compressor.dtype) for span in spans)
            parts = [{"type": "prompt_embeds", "data": wire} for wire in wires]
            return {**read.body, "messages": read.chat.fill(parts)}
        remaining = iter(spans)
        rows = []
        for prompt in prompts:
            own = [(span.latents_ND, span.cached_tokens) for _, span in zip(prompt.spans, remaining, strict=False)]
            rows.append(encode_wire(self._compressor.embed(prompt, own).values_TD))
        others = {name: value for name, value in read.body.items() if name != "prompt"}
        return {**others, "prompt_embeds": rows if isinstance(read.body["prompt"], list) else rows[0]}


def _cache_salt(owner: str, given: Any) -> str:
    """A salt that no other key's requests have, whatever salt they send."""
    if given is not None and not isinstance(given, str):
        raise ApiError(400, f"{_CACHE_SALT} is {shown(given)}, expected a text")
    return hashlib.sha256(f"{owner} {given or ''}".encode()).hexdigest()
