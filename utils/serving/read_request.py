"""A request's bytes → its fields and the memory spans in them; nothing is tokenised yet.

read = reader.read(CHAT, raw, owner)
read.sources            # the spans: texts, or stored memories that they name
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from utils.errors import PromptError
from utils.model.markers import has_markers
from utils.serving.api_error import ApiError, shown
from utils.serving.auto_memory import mark_long_parts
from utils.serving.chat_parts import ChatOutline, Part, SpanSplitter, outline_chat
from utils.serving.json_body import read_object
from utils.serving.memories import Memory, MemoryStore
from utils.serving.model_names import read_name
from utils.serving.prompt_rows import PromptRows
from utils.serving.request_options import EXTENSION, OptionsReader, RequestOptions
from utils.serving.settings import GatewaySettings

Body = dict[str, Any]

CHAT, COMPLETIONS = "/chat/completions", "/completions"
# vLLM's own field: what has another salt shares no prefix cache.
_CACHE_SALT = "cache_salt"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRequest:
    """A body that was read: its fields, and where its spans are.

    Attributes:
        path: Its endpoint.
        raw: The client's bytes.
        body: Its fields, less what is the gateway's own.
        is_ours: The request asked something of the gateway, so that the answer tells what was done.
        is_changed: `body` is another than the client's.
        options: What it asks of the gateway.
        chat: A chat's messages; None for a completion.
        prompts: A completion's marked prompts, each as texts and spans in turns: a text first and last.
        sources: What the spans stand for, or their segments; together no longer than a body.
        num_segments: Of each span, where it was cut into segments.
    """

    path: str
    raw: bytes
    body: Body
    is_ours: bool
    is_changed: bool
    options: RequestOptions
    chat: ChatOutline | None
    prompts: list[list[str]]
    sources: list[str | Memory]
    num_segments: Sequence[int] = ()

    @property
    def texts(self) -> list[str]:
        """The spans' texts."""
        return [source.text if isinstance(source, Memory) else source for source in self.sources]

    def with_parts(self, span_parts: Sequence[Sequence[Part]]) -> Body:
        """A chat's body with content parts for each span, or each segment."""
        assert self.chat is not None
        if self.num_segments:
            remaining = iter(span_parts)
            span_parts = [[*chain(*islice(remaining, count))] for count in self.num_segments]
        return {**self.body, "messages": self.chat.fill(span_parts)}

    def with_prompts(self, texts: Sequence[str]) -> Body:
        """A completion's body with a text for each span."""
        remaining = iter(texts)
        plain = [
            "".join(next(remaining) if place % 2 else text for place, text in enumerate(pieces))
            for pieces in self.prompts
        ]
        return {**self.body, "prompt": plain if isinstance(self.body["prompt"], list) else plain[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReader:
    """Reads bodies within the gateway's limits.

    Attributes:
        rows: Counts what is counted without a tokenizer.
        options: Reads what requests ask of the gateway.
        memories: Stored texts that spans may name.
        settings: Limits.
        is_local: The backend decodes in this process.
        salted: The backend is a server whose prefix cache takes salts.
    """

    rows: PromptRows
    options: OptionsReader
    memories: MemoryStore
    settings: GatewaySettings
    is_local: bool
    salted: bool

    def read(self, path: str, raw: bytes, owner: str, *, may_mark: bool = True) -> ReadRequest:
        """Read a body.

        Args:
            path: The endpoint, `CHAT` or `COMPLETIONS`.
            raw: The body.
            owner: Whose memories it may use, and what it may not share.
            may_mark: Long parts without markers may become memory, if that is wanted.

        Raises:
            PromptError: The markers are wrong.
            ApiError: 400, a body of another shape; 404, an unknown memory; 413, too many spans or bytes.
        """
        return self.read_parsed(path, raw, read_object(raw), owner, may_mark=may_mark)

    def read_parsed(self, path: str, raw: bytes, body: Body, owner: str, *, may_mark: bool = True) -> ReadRequest:
        """`read` of a body that was parsed, and may have been changed since."""
        body = read_name(body, self.options.chunk_sizes)
        chat, prompts = None, []
        options = self.options.read(body)
        if path == CHAT:
            if self.is_local and isinstance(body.get("messages"), list):
                self.rows.check_count(len(body["messages"]), "the chat, at one row a message or more")
            chat = outline_chat(body.get("messages"), self.settings.max_spans)
            if options.auto and may_mark:
                chat = mark_long_parts(chat, options.auto, self.settings.max_spans)
            spans = chat.spans
        else:
            prompts = self._marked_prompts(body)
            spans = [span for pieces in prompts for span in pieces[1::2]]
        if options.tool and path != CHAT:
            raise ApiError(400, "the tool expand needs a chat: completions call no tools")
        sources = [self.memories.resolve(span, owner) or span for span in spans]
        num_bytes = len(raw) + sum(source.size_bytes for source in sources if isinstance(source, Memory))
        if num_bytes > self.settings.max_body_bytes:
            raise ApiError(
                413, f"with the stored texts that it names the body has {num_bytes} bytes, the limit is "
                f"{self.settings.max_body_bytes}",
            )  # fmt: skip
        salt = {_CACHE_SALT: _cache_salt(owner, body.get(_CACHE_SALT))} if owner and self.salted else {}
        return ReadRequest(
            path=path,
            raw=raw,
            body={name: value for name, value in body.items() if name != EXTENSION} | salt,
            is_ours=EXTENSION in body or bool(sources),
            is_changed=EXTENSION in body or bool(salt),
            options=options,
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
        self.rows.check_together(len(texts))
        splitter = SpanSplitter(self.settings.max_spans)
        return [[piece.text for piece in splitter.split(text, "the prompt")] for text in texts]


def _cache_salt(owner: str, given: Any) -> str:
    """A salt that no other key's requests have, whatever salt they send."""
    if given is not None and not isinstance(given, str):
        raise ApiError(400, f"{_CACHE_SALT} is {shown(given)}, expected a text")
    return hashlib.sha256(f"{owner} {given or ''}".encode()).hexdigest()
