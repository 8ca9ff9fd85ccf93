"""A client's request body → the body for the backend, with latents where memory markers were.

    compressed = await RequestCompressor(compressor, queue, memories, settings).compress(CHAT, raw, owner)

In order: read the JSON, find the spans, count what all of it expands to, choose what stays text, and only then encode.
What cannot fit is refused before it costs anything; long bodies are read and written beside the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import orjson
import torch

from utils.compress.compressor import Compressor
from utils.compress.policies.registry import POLICIES
from utils.compress.prompt_embeds import encode_wire
from utils.errors import CodeLlavaError
from utils.model.markers import PLACEHOLDER
from utils.model.prompt import MemoryPrompt, MemorySpan
from utils.serving.api_error import ApiError, shown
from utils.serving.chat_parts import EMBEDS, RESERVED, Part, between_markers, text_part
from utils.serving.encoder_queue import EncodedSpan, EncoderQueue
from utils.serving.expand_tool import ExpandTool, Segment, check_request, label, segment_ranges
from utils.serving.memories import MemoryStore
from utils.serving.plain_text import PlainText
from utils.serving.prompt_rows import ONE_PROMPT
from utils.serving.read_request import Body, ReadRequest
from utils.serving.report import span_reports
from utils.serving.request_options import OptionsReader
from utils.serving.rewriter import CompressedRequest, Rewriter
from utils.serving.settings import GatewaySettings

logger = logging.getLogger(__name__)


class RequestCompressor(Rewriter):
    """Puts latents in the spans' places: a chat's become content parts, a completion's prompt with memory rows.

    Args:
        compressor: Parses and embeds.
        queue: Encodes; closed with this.
        memories: Stored texts that spans may name.
        settings: Limits, keys and the policy on failure.
        is_local: See `Rewriter`.
    """

    mode = "latents"

    def __init__(
        self,
        compressor: Compressor,
        queue: EncoderQueue,
        memories: MemoryStore,
        settings: GatewaySettings,
        is_local: bool = False,
    ) -> None:
        config = compressor.files.config
        sizes = {config.chunk_size, *config.chunk_sizes}
        options = OptionsReader(sizes, settings.expansion, has_tool=not is_local, auto=settings.auto_memory)
        super().__init__(compressor, options, memories, settings, is_local=is_local)
        self._compressor = compressor
        self._queue = queue
        self._plain = PlainText(compressor.processor.tokenizers.decoder, self._rows, self._ids_part)

    def close(self) -> None:
        """End the threads."""
        self._queue.close()
        super().close()

    async def _rewrite(self, read: ReadRequest, owner: str) -> CompressedRequest:
        if read.options.tool:
            check_request(read.body)
            whole = read
            read = await self._tokenizer.run(lambda: self._in_segments(whole))
        prompts, questions = await self._tokenizer.run(lambda: self._parse(read))
        if not read.sources:
            return await self._tokenizer.run(lambda: self._write(read, prompts, []))
        sent = await self._tokenizer.run(lambda: self._as_sent(read))
        spans = await self._encode([*questions, *(span for prompt in prompts for span in prompt.spans)], owner)
        return await self._tokenizer.run(lambda: self._select_and_write(sent, prompts, questions, spans))

    def _parse(self, read: ReadRequest) -> tuple[list[MemoryPrompt], list[MemorySpan]]:
        """What the backend will read, and, where latents select, the questions of the prompts with memory.

        What cannot fit is refused.
        """
        prompts, expansion = self._prompts(read), read.options.expansion
        if expansion is None or not read.sources:
            return prompts, []
        asked: list[MemorySpan] = []
        if POLICIES[expansion.policy].reads_query:
            with_memory = [prompt for prompt in prompts if prompt.spans]
            asked = [span for prompt in with_memory if (span := self._rows.question(prompt, expansion))]
            if len(asked) < len(with_memory):
                if not read.options.asks_to_expand:
                    return prompts, []
                raise ApiError(
                    400, "the prompt asks nothing outside its memory: say with expand_query what to select by, or "
                    "choose the expand_policy random or all",
                )  # fmt: skip
        if expansion.policy == "latents":
            return prompts, asked
        return self._rows.expand(prompts, expansion), []

    def _as_sent(self, read: ReadRequest) -> ReadRequest:
        """The request with rows in the places of texts that a server would obey."""
        if read.chat is None or self._is_local:
            return read
        return replace(read, chat=self._plain.outline(read.chat, read.body))

    def _in_segments(self, read: ReadRequest) -> ReadRequest:
        """The request with a source for each segment that the tool can show."""
        prompt = self._rows.spans_alone(read.sources, read.options.chunk_size)
        memories = self._rows.memory_texts(prompt)
        texts = [[memory.text[slice(*chars)] for chars in segment_ranges(memory)] for memory in memories]
        return replace(read, sources=[*chain(*texts)], num_segments=[*map(len, texts)])

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
        """`_write`, after the latents of the questions, if any come first, have selected what stays text."""
        if encoded is None or not questions or read.options.expansion is None:
            return self._write(read, prompts, encoded)
        spans = encoded[len(questions) :]
        asked, remaining = iter(encoded), iter(spans)
        latents = [
            [next(asked).latents_ND, *(next(remaining).latents_ND for _ in prompt.spans)] if prompt.spans else []
            for prompt in prompts
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
        if spans is not None and read.options.tool:
            return self._with_tool(read, prompts, spans)
        if spans is not None:
            body = read.body if self._is_local else self._with_latents(read, prompts, spans)
        else:
            body = self._without_spans(read)
            if self._is_local and read.chat is not None:
                prompts = [self._rows.chat(read.chat.flat(read.texts), [], None)]
            elif self._is_local:
                prompts = [self._rows.plain(body["prompt"])]
        return self._forward(
            read,
            body,
            b"" if self._is_local else orjson.dumps(body),
            prompts=prompts,
            spans=spans or (),
            fallback=spans is None,
            reports=span_reports(prompts, spans) if spans else (),
        )

    def _without_spans(self, read: ReadRequest) -> Body:
        """The body with the memory as plain text."""
        if read.chat is not None:
            texts = map(text_part, read.texts) if self._is_local else self._plain.parts(read.texts)
            return read.with_parts([[part] for part in texts])
        if token := next(filter(None, map(self._plain.find, read.texts)), None):
            raise ApiError(
                500,
                f"the encoder failed, and as plain text the memory's {shown(token)} would be obeyed: nothing was sent",
            )
        return read.with_prompts(read.texts)

    def _with_tool(
        self, read: ReadRequest, prompts: Sequence[MemoryPrompt], spans: Sequence[EncodedSpan]
    ) -> CompressedRequest:
        """A request that its tool's loop asks."""
        (alone,) = prompts
        decoder = self._compressor.processor.tokenizers.decoder
        segments = []
        own = zip(alone.spans, self._chat_parts(alone, spans), span_reports(prompts, spans), strict=True)
        for number, (span, parts, report) in enumerate(own, start=1):
            name = f"seg_{number}"
            label_rows = len(decoder(label(name) + "\n", add_special_tokens=False)["input_ids"])
            framed = replace(report, frame_rows=report.frame_rows + label_rows)
            segments.append(Segment(id=name, text=span.text, latents=parts, report=framed))
        loop = ExpandTool(
            read,
            self._forward(read, read.body, b""),
            segments,
            self._rows.max_prompt_rows,
            self._tokenizer,
            self._plain,
            decoder,
        )
        return self._forward(read, read.body, b"", loop=loop)

    def _with_latents(self, read: ReadRequest, prompts: Sequence[MemoryPrompt], spans: Sequence[EncodedSpan]) -> Body:
        if read.chat is not None:
            (alone,) = prompts
            return read.with_parts(self._chat_parts(alone, spans))
        remaining = iter(spans)
        rows = []
        for prompt in prompts:
            own = [(span.latents_ND, span.cached_tokens) for _, span in zip(prompt.spans, remaining, strict=False)]
            rows.append(encode_wire(self._compressor.embed(prompt, own).values_TD))
        others = {name: value for name, value in read.body.items() if name != "prompt"}
        return {**others, "prompt_embeds": rows if isinstance(read.body["prompt"], list) else rows[0]}

    def _chat_parts(self, prompt: MemoryPrompt, spans: Sequence[EncodedSpan]) -> list[list[Part]]:
        """For each span its content parts: between the markers runs of latents and, in their places, texts."""
        own = zip(prompt.spans, spans, strict=True)
        return [self._span_parts(prompt, span, encoded.latents_ND) for span, encoded in own]

    def _span_parts(self, prompt: MemoryPrompt, span: MemorySpan, latents_ND: torch.Tensor) -> list[Part]:
        parts: list[tuple[int, Part]] = [
            (start, self._rows_part(latents_ND[chunk : chunk + stop - start]))
            for start, stop, chunk in span.latent_runs
        ]
        for segment in span.segments:
            text = "".join(span.text[begin:end] for begin, end in segment.chars)
            if RESERVED in text:
                parts.append((segment.rows[0], self._ids_part(prompt.input_ids[slice(*segment.rows)])))
            else:
                parts.append((segment.rows[0], text_part(text)))
        return between_markers([part for _, part in sorted(parts, key=lambda placed: placed[0])])

    def _ids_part(self, ids: list[int]) -> Part:
        return self._rows_part(self._compressor.embed(MemoryPrompt(input_ids=ids, spans=()), []).values_TD)

    def _rows_part(self, rows_TD: torch.Tensor) -> Part:
        return {"type": EMBEDS, "data": encode_wire(rows_TD, self._compressor.dtype)}
