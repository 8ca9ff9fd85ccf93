"""A client's request on its way to the backend: what all ways of rewriting it share.

compressed = await rewriter.compress(CHAT, raw, owner)
compressed.content    # the bytes to forward; the client's own where there is nothing to change
compressed.report()   # what the answer says about the spans
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import orjson

from utils.model.prompt import MemoryPrompt
from utils.serving.api_error import ApiError, shown
from utils.serving.chat_parts import AutoPart
from utils.serving.encoder_queue import EncodedSpan
from utils.serving.expand_tool import ExpandTool
from utils.serving.json_body import MAX_DEPTH, MAX_VALUES
from utils.serving.memories import Memory, MemoryStore
from utils.serving.message_call import Kind, MessageCall
from utils.serving.off_loop import OffLoop
from utils.serving.prompt_rows import PromptParser, PromptRows
from utils.serving.read_request import Body, ReadRequest, RequestReader
from utils.serving.report import SpanReport, totals
from utils.serving.request_options import OptionsReader
from utils.serving.selected_text import DEFAULT, TEXT_POLICIES, SelectedText, TextSelector
from utils.serving.settings import GatewaySettings

Mode = Literal["latents", "text"]


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
        tool: What the model did with the tool `expand`; None where it was not offered.
        loop: Asks on the request's behalf, round by round.
        auto: What became of each part of a chat without markers; None where only markers count.
        mode: Whether memory becomes latents, or text for a backend that reads nothing else.
    """

    path: str
    body: Body
    content: bytes = b""
    prompts: Sequence[MemoryPrompt] = ()
    is_ours: bool = False
    spans: Sequence[EncodedSpan] = ()
    fallback: bool = False
    reports: Sequence[SpanReport] = ()
    tool: Body | None = None
    loop: ExpandTool | None = None
    auto: Sequence[AutoPart] | None = None
    mode: Mode = "latents"

    def report(self) -> Body:
        """The extension field of an answer."""
        return {
            "mode": self.mode,
            **totals(self.reports),
            "fallback": "plain-text" if self.fallback else None,
            **({} if self.tool is None else {"tool": self.tool}),
            **({} if self.auto is None else {"auto": [asdict(part) for part in self.auto]}),
            "spans": [span.to_json() for span in self.reports],
        }


class Rewriter(abc.ABC):
    """Rewrites request bodies.

    Args:
        parser: Tokenizers and limits.
        options: Reads what requests ask of the gateway.
        memories: Stored texts that spans may name.
        settings: Limits.
        is_local: The backend decodes in this process: its text is parsed here, too, once and before the work begins.
        salted: The backend is a server whose prefix cache takes salts.
    """

    mode: Mode

    def __init__(
        self,
        parser: PromptParser,
        options: OptionsReader,
        memories: MemoryStore,
        settings: GatewaySettings,
        *,
        is_local: bool = False,
        salted: bool = True,
    ) -> None:
        self._parser = parser
        self._options = options
        self._memories = memories
        self._settings = settings
        self._is_local = is_local
        self._rows = PromptRows(parser, settings.max_request_rows)
        self._reader = RequestReader(
            rows=self._rows,
            options=options,
            memories=memories,
            settings=settings,
            is_local=is_local,
            salted=salted and not is_local,
        )
        rows = self._rows
        if not isinstance(parser, TextSelector):
            # Whoever reads text only judges by itself what it can read; nothing is encoded, and nothing cut off unseen.
            unlimited = TextSelector(parser.files, replace(parser.processor, limit=None))
            rows = PromptRows(unlimited, settings.max_request_rows, remembers=False)
        self._selected = SelectedText(rows, parser.processor.tokenizers.decoder)
        # A tokenizer must not be used by two threads at once, and its work must not wait for long bodies.
        self._tokenizer = OffLoop("tokenizer")
        self._bodies = OffLoop("bodies")

    def close(self) -> None:
        """End the threads."""
        self._tokenizer.close()
        self._bodies.close()

    async def compress(self, path: str, raw: bytes, owner: str = "", *, may_mark: bool = True) -> CompressedRequest:
        """Rewrite a body.

        Args:
            path: The endpoint, `CHAT` or `COMPLETIONS`.
            raw: The body.
            owner: Whose memories and cache entries it may use, and what it may not share.
            may_mark: Long parts without markers may become memory, if that is wanted.

        Raises:
            PromptError: The markers are wrong, or a span is too long.
            ApiError: 400, a body of another shape; 413, too many spans or rows; also an unknown memory, a full queue,
                an encoder that failed.
        """
        read = await self._bodies.run_if_long(len(raw), lambda: self._reader.read(path, raw, owner, may_mark=may_mark))
        if not (read.sources or self._is_local):
            return await self._bodies.run_if_long(len(raw), lambda: self._unchanged(read))
        return await self._rewrite(read, owner)

    async def compress_messages(
        self, raw: bytes, owner: str = "", *, may_mark: bool = True
    ) -> tuple[Body, CompressedRequest]:
        """Compress a chat's messages for a caller that sends them itself.

        Args:
            raw: The body of `POST /v1/compress`.
            owner: Whose memories and cache entries it may use, and who can have the originals again.
            may_mark: See `compress`.

        Returns:
            The answer, and what else is known of the request.

        Raises:
            PromptError, ApiError: As `compress`.
        """
        kinds: Sequence[Kind] = ("text",) if self._is_local or self.mode == "text" else ("latents", "text")
        call = await self._bodies.run_if_long(
            len(raw), lambda: MessageCall.read_from(raw, self._reader, owner, kinds, may_mark=may_mark)
        )
        rows = self._selected.rows if call.kind == "text" else self._rows
        num_outside = await self._tokenizer.run(lambda: rows.num_rows(call.chat.texts()))
        ids: Sequence[str] = ()
        if not call.read.sources:
            done = self._unchanged(call.read)
        elif call.kind == "text":
            done, ids = await self._tokenizer.run(lambda: self._as_text(call, owner))
        else:
            done = await self._rewrite(call.read, owner)
        return call.answer(done.body["messages"], done.report(), done.reports, num_outside, ids), done

    def _as_text(self, call: MessageCall, owner: str) -> tuple[CompressedRequest, Sequence[str]]:
        """The call with selected text in its spans' places, and the ids of what was left out."""
        read = call.read
        expansion = read.options.expansion
        if not read.options.asks_to_expand and (expansion is None or expansion.policy not in TEXT_POLICIES):
            # What the gateway was started with speaks of latents.
            expansion = DEFAULT
        if expansion is None or expansion.policy not in TEXT_POLICIES:
            raise ApiError(
                400, f"as text needs a budget above 0 and one of the policies {', '.join(TEXT_POLICIES)}, got "
                f"{shown(expansion.policy) if expansion else 'none'}",
            )  # fmt: skip
        selected = self._selected
        parts = selected.choose(selected.rows.spans_alone(read.sources, 1, call.chat.query()), expansion)
        left_out = [
            (number, source)
            for number, (part, source) in enumerate(zip(parts, read.sources, strict=True))
            if part.num_left_out
        ]
        # What is stored already has an id.
        new = [(number, source) for number, source in left_out if isinstance(source, str)]
        kept = self._memories.keep([text for _, text in new], owner)
        ids = {number: source.id for number, source in left_out if isinstance(source, Memory)}
        ids |= {number: memory.id for (number, _), memory in zip(new, kept, strict=True)}
        texts = [part.text(ids.get(number)) for number, part in enumerate(parts)]
        reports = [selected.report(part, text) for part, text in zip(parts, texts, strict=True)]
        body = {**read.body, "messages": call.chat.fill_texts(texts)}
        return self._forward(read, body, b"", reports=reports), [*ids.values()]

    @property
    def chunk_sizes(self) -> Sequence[int]:
        """What requests may choose among; none where there are no latents."""
        return self._options.chunk_sizes

    def settings_report(self) -> Body:
        """What a client may want to know before it asks: the checkpoint, what it may ask for, and the limits."""
        files, settings, default = self._parser.files, self._settings, self._options.default
        return {
            "mode": self.mode,
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

    @abc.abstractmethod
    async def _rewrite(self, read: ReadRequest, owner: str) -> CompressedRequest:
        """A request that has memory, or one for a decoder in this process."""

    def _unchanged(self, read: ReadRequest) -> CompressedRequest:
        return self._forward(read, read.body, orjson.dumps(read.body) if read.is_changed else read.raw)

    def _forward(self, read: ReadRequest, body: Body, content: bytes, **more: Any) -> CompressedRequest:
        return CompressedRequest(
            path=read.path,
            body=body,
            content=content,
            is_ours=read.is_ours,
            auto=read.chat.auto if read.chat else None,
            mode=self.mode,
            **more,
        )
