"""A client's request body → the body for the backend, with latents where memory markers were.

    compressed = await requests.compress(CHAT, raw, owner)
    compressed.content    # the bytes to forward; the client's own where there is nothing to change
    compressed.report()   # what the answer says about the spans

In order: read the JSON, find the spans, count what all of it expands to, choose what stays text, and only then encode.
What cannot fit is refused before it costs anything; long bodies are read and written beside the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
import torch

from utils.compress.compressor import Compressor
from utils.compress.policies.registry import POLICIES
from utils.compress.prompt_embeds import encode_wire
from utils.errors import CodeLlavaError
from utils.model.markers import PLACEHOLDER
from utils.model.prompt import MemoryPrompt, MemorySpan
from utils.serving.api_error import ApiError
from utils.serving.chat_parts import Part, between_markers, outline_chat, text_part
from utils.serving.encoder_queue import EncodedSpan, EncoderQueue
from utils.serving.json_body import MAX_DEPTH, MAX_VALUES
from utils.serving.memories import MemoryStore
from utils.serving.off_loop import OffLoop
from utils.serving.prompt_rows import ONE_PROMPT, PromptRows
from utils.serving.read_request import Body, ReadRequest, RequestReader
from utils.serving.report import SpanReport, span_reports, totals
from utils.serving.request_options import OptionsReader
from utils.serving.settings import GatewaySettings

logger = logging.getLogger(__name__)


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
        reports: What became of each span.
    """

    path: str
    body: Body
    content: bytes = b""
    prompts: Sequence[MemoryPrompt] = ()
    is_ours: bool = False
    spans: Sequence[EncodedSpan] = ()
    fallback: bool = False
    reports: Sequence[SpanReport] = ()

    def report(self) -> Body:
        """The extension field of an answer."""
        return {
            **totals(self.reports),
            "fallback": "plain-text" if self.fallback else None,
            "spans": [span.to_json() for span in self.reports],
        }


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
        config = compressor.files.config
        self._options = OptionsReader({config.chunk_size, *config.chunk_sizes}, settings.expansion)
        self._reader = RequestReader(self._rows, self._options, memories, settings, is_local=is_local)
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
        read = await self._bodies.run_if_long(len(raw), lambda: self._reader.read(path, raw, owner))
        if not (read.sources or self._is_local):
            return await self._bodies.run_if_long(len(raw), lambda: _unchanged(read))
        prompts, questions = await self._tokenizer.run(lambda: self._parse(read))
        if not read.sources:
            return await self._tokenizer.run(lambda: self._write(read, prompts, []))
        spans = await self._encode([*questions, *(span for prompt in prompts for span in prompt.spans)], owner)
        return await self._tokenizer.run(lambda: self._select_and_write(read, prompts, questions, spans))

    def settings_report(self) -> Body:
        """What a client may want to know before it asks: the checkpoint, its chunk sizes and the limits."""
        files, settings, default = self._compressor.files, self._settings, self._options.default
        return {
            "checkpoint": files.root.name,
            "chunk_size": files.config.chunk_size,
            "chunk_sizes": self._options.chunk_sizes,
            "expand_policies": self._options.policies,
            "expand_default": default and {
                "expand_policy": default.policy,
                "expand_tokens": default.tokens,
                "expand": default.share if default.share is None else float(default.share),
            },
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
        }  # fmt: skip

    def _parse(self, read: ReadRequest) -> tuple[list[MemoryPrompt], list[MemorySpan]]:
        """What the backend will read, and, where they select, the prompts' questions; what cannot fit is refused."""
        prompts, expansion = self._prompts(read), read.options.expansion
        if expansion is None or not read.sources:
            return prompts, []
        asked: list[MemorySpan] = []
        if POLICIES[expansion.policy].reads_query:
            asked = [span for prompt in prompts if (span := self._rows.question(prompt, expansion))]
            if len(asked) < len(prompts):
                if not read.options.asks_to_expand:
                    return prompts, []
                raise ApiError(
                    400, "the prompt asks nothing outside its memory: say with expand_query what to select by, or "
                    "choose the expand_policy random or all",
                )  # fmt: skip
        if expansion.policy == "latents":
            return prompts, asked
        return self._rows.expand(prompts, expansion), []

    def _prompts(self, read: ReadRequest) -> list[MemoryPrompt]:
        """The prompts with all latents, or of a server's chat the spans alone."""
        rows, size = self._rows, read.options.chunk_size
        if read.chat is not None and self._is_local:
            return [rows.chat(read.chat.flat([PLACEHOLDER] * len(read.sources)), read.sources, size)]
        if read.chat is not None:
            return [rows.spans_alone(read.sources, size, read.chat.query() if read.options.expansion else "")]
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

    def _select_and_write(
        self,
        read: ReadRequest,
        prompts: Sequence[MemoryPrompt],
        questions: Sequence[MemorySpan],
        encoded: Sequence[EncodedSpan] | None,
    ) -> CompressedRequest:
        """`_write`, after the latents of the questions, which come first, have selected what stays text."""
        if encoded is None or not questions or read.options.expansion is None:
            return self._write(read, prompts, encoded)
        asked, spans = encoded[: len(questions)], encoded[len(questions) :]
        remaining = iter(spans)
        latents = [
            [question.latents_ND, *(next(remaining).latents_ND for _ in prompt.spans)]
            for question, prompt in zip(asked, prompts, strict=True)
        ]
        return self._write(read, self._rows.expand(prompts, read.options.expansion, latents), spans)

    async def _encode(self, spans: Sequence[MemorySpan], owner: str) -> list[EncodedSpan] | None:
        """What the encoder makes of spans; None when it failed and plain text is the policy."""
        try:
            return await self._queue.encode(spans, owner.encode())
        except (ApiError, CodeLlavaError):
            raise
        except Exception as error:  # out of memory, a broken device, …: whatever stops the encoder
            logger.exception("the encoder failed")
            if self._settings.on_error == "plain-text":
                return None
            raise ApiError(500, f"the encoder failed ({type(error).__name__}): nothing was sent") from None

    def _write(
        self, read: ReadRequest, prompts: Sequence[MemoryPrompt], spans: Sequence[EncodedSpan] | None
    ) -> CompressedRequest:
        """The request as the backend takes it; without spans the encoder has failed."""
        if spans is not None:
            body = read.body if self._is_local else self._with_latents(read, prompts, spans)
        else:
            body = read.with_plain_text(read.texts)
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
            reports=span_reports(prompts, spans) if spans else (),
        )

    def _with_latents(self, read: ReadRequest, prompts: Sequence[MemoryPrompt], spans: Sequence[EncodedSpan]) -> Body:
        if read.chat is not None:
            (alone,) = prompts
            return read.with_parts(
                [
                    _span_parts(span, encoded.latents_ND, self._compressor.dtype)
                    for span, encoded in zip(alone.spans, spans, strict=True)
                ]
            )
        remaining = iter(spans)
        rows = []
        for prompt in prompts:
            own = [(span.latents_ND, span.cached_tokens) for _, span in zip(prompt.spans, remaining, strict=False)]
            rows.append(encode_wire(self._compressor.embed(prompt, own).values_TD))
        others = {name: value for name, value in read.body.items() if name != "prompt"}
        return {**others, "prompt_embeds": rows if isinstance(read.body["prompt"], list) else rows[0]}


def _unchanged(read: ReadRequest) -> CompressedRequest:
    """A request without memory."""
    content = orjson.dumps(read.body) if read.is_changed else read.raw
    return CompressedRequest(path=read.path, body=read.body, content=content, is_ours=read.is_ours)


def _span_parts(span: MemorySpan, latents_ND: torch.Tensor, dtype: torch.dtype) -> list[Part]:
    """A chat's content parts for one span: between its markers runs of latents and, in their places, texts."""
    parts = [
        (start, {"type": "prompt_embeds", "data": encode_wire(latents_ND[chunk : chunk + stop - start], dtype)})
        for start, stop, chunk in span.latent_runs
    ]
    for segment in span.segments:
        parts.append((segment.rows[0], text_part("".join(span.text[begin:end] for begin, end in segment.chars))))
    parts.sort(key=lambda placed: placed[0])
    return between_markers([part for _, part in parts])
