"""What a request of `POST /v1/compress` asks, and what it is answered: a chat's messages, compressed and not sent.

    {"messages": […], "model": "…", "as": "text"}
    → {"messages": […], "tokens_before": 5120, "tokens_after": 700, "compression_ratio": 7.3, "ccr_hashes": ["…"]}

The shape is that of LiteLLM's guardrail for compression services, which asks again for what was left out under
`GET /v1/retrieve/{hash}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from utils.serving.api_error import ApiError, shown
from utils.serving.chat_parts import ChatOutline
from utils.serving.json_body import read_object
from utils.serving.read_request import CHAT, Body, ReadRequest, RequestReader
from utils.serving.report import SpanReport
from utils.serving.request_options import EXTENSION

Kind = Literal["latents", "text"]
# `config` is the guardrail's word to another service.
_FIELDS = ("messages", "model", "as", "config", EXTENSION)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCall:
    """One request.

    Attributes:
        read: As a chat's request.
        chat: Its messages.
        kind: What long parts become.
    """

    read: ReadRequest
    chat: ChatOutline
    kind: Kind

    @classmethod
    def read_from(
        cls, raw: bytes, reader: RequestReader, owner: str, kinds: Sequence[Kind], *, may_mark: bool = True
    ) -> MessageCall:
        """Read a body; long parts become memory unless it says otherwise.

        Args:
            raw: The body.
            reader: Reads what is as in other requests.
            owner: Whose memories it may use.
            kinds: What it may choose, the default first.
            may_mark: See `RequestReader.read`.

        Raises:
            PromptError: The markers are wrong.
            ApiError: 400, a body of another shape; 404, an unknown memory; 413, too many spans or bytes.
        """
        body = read_object(raw)
        if others := sorted(body.keys() - _FIELDS):
            names = ", ".join(map(shown, others[:10]))
            raise ApiError(400, f"/v1/compress has no {names}: expected any of {', '.join(_FIELDS)}")
        kind = body.pop("as", None) or kinds[0]
        if kind not in kinds:
            raise ApiError(400, f"as is {shown(kind)}, this gateway has {' and '.join(kinds)}")
        body.pop("config", None)
        asked = body.get(EXTENSION) or {}
        if isinstance(asked, dict) and asked.get("auto") is None:
            body[EXTENSION] = {**asked, "auto": True}
        read = reader.read_parsed(CHAT, raw, body, owner, may_mark=may_mark)
        if read.options.tool:
            raise ApiError(400, "the tool expand answers chats: leave it out here")
        assert read.chat is not None
        return cls(read=read, chat=read.chat, kind=kind)

    def answer(
        self, messages: Any, report: Body, spans: Sequence[SpanReport], num_outside: int, ids: Sequence[str] = ()
    ) -> Body:
        """The answer.

        Args:
            messages: The compressed ones.
            report: What other answers tell under `code_llava`.
            spans: What became of each span.
            num_outside: Tokens of the texts outside the memory.
            ids: Under which originals can be had.
        """
        before = num_outside + sum(span.tokens for span in spans)
        after = num_outside + sum(span.rows for span in spans)
        return {
            "messages": messages,
            "tokens_before": before,
            "tokens_after": after,
            "compression_ratio": before / after if after else 1.0,
            "ccr_hashes": list(dict.fromkeys(ids)),
            EXTENSION: {**report, "mode": self.kind},
        }
