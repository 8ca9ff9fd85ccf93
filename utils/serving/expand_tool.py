"""The tool `expand`: a model that calls tools chooses by itself which segments of the memory it reads as text.

    seg_1:                              seg_1:
    <|memory_start|> L L <|memory_end|> <|memory_start|> L L <|memory_end|>
    seg_2:                        ──►   seg_2:
    <|memory_start|> L L <|memory_end|> def area(width, height): …

The gateway runs the loop: when an answer calls the tool, the segment's text takes the place of its latents, and the
chat is asked again with the call and its result at the end. After `MAX_ROUNDS` the tool is no longer offered. An answer
that calls the client's own tools as well has not read the text yet: only its calls of `expand` are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson

from utils.compress.select import MemoryText
from utils.model.expand import CharRange
from utils.serving.api_error import ApiError
from utils.serving.backend import Answer
from utils.serving.chat_parts import Part, text_part
from utils.serving.off_loop import OffLoop
from utils.serving.plain_text import PlainText
from utils.serving.read_request import Body, ReadRequest
from utils.serving.report import MARKER_ROWS, SpanReport, merged

if TYPE_CHECKING:
    from utils.serving.rewriter import CompressedRequest

NAME = "expand"
MAX_ROUNDS = 5
_SEGMENT_TOKENS = 256
# As strict as schemas get; without the ids, which would change the beginning of the prompt from round to round.
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Show one segment of the memory as its exact text, in its place. Call it when the answer needs "
        "exact names, numbers or code of a segment.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"segment_id": {"type": "string", "description": "The id before the segment, as seg_3"}},
            "required": ["segment_id"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a span that the tool can show.

    Attributes:
        id: What the model calls it.
        text: Its characters.
        latents: Content parts of its latents, between markers.
        report: What the decoder reads of it now.
    """

    id: str
    text: str
    latents: Sequence[Part]
    report: SpanReport

    def parts(self, is_text: bool) -> list[Part]:
        """Its content parts, with its id before them."""
        shown = [text_part(self.text)] if is_text else self.latents
        line_end = "" if is_text and self.text.endswith("\n") else "\n"
        return [text_part(label(self.id)), *shown, text_part(line_end)]

    def as_text(self, num_rows: int) -> SpanReport:
        """The report once its text, of so many rows, is shown."""
        whole = [([(0, len(self.text))], num_rows)]
        frame_rows = self.report.frame_rows - MARKER_ROWS
        return replace(self.report, latents=0, text_rows=num_rows, segments=whole, frame_rows=frame_rows)


def label(segment_id: str) -> str:
    """What stands before a segment."""
    return f"{segment_id}:\n"


def segment_ranges(memory: MemoryText) -> list[CharRange]:
    """A span's segments, end to end: runs of whole lines of up to 256 encoder tokens."""
    begins, first_token = [0], 0
    for (begin, _), (first, stop) in zip(memory.pieces, memory.piece_tokens, strict=True):
        if begin > begins[-1] and stop - first_token > _SEGMENT_TOKENS:
            begins.append(begin)
            first_token = first
    return list(zip(begins, [*begins[1:], len(memory.text)], strict=True))


def check_request(body: Body) -> None:
    """Refuse a chat with which the loop cannot be run.

    Raises:
        ApiError: 400, it streams, wants several answers, or has a tool of the same name.
    """
    if body.get("stream"):
        raise ApiError(400, f"the tool {NAME} cannot stream: the gateway must read an answer whole; leave stream out")
    if body.get("n") not in (None, 1):
        raise ApiError(400, f"the tool {NAME} needs one answer: leave n out")
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise ApiError(400, "tools must be a list")
    if any(_name(tool) == NAME for tool in [*tools, body.get("tool_choice")]):
        raise ApiError(400, f"the request's own tool is called {NAME}, as the gateway's: give it another name")


class ExpandTool:
    """The loop of one chat.

    Args:
        read: The request.
        request: What a request without the tool would be.
        segments: Of all spans, in order.
        max_rows: Rows that the memory may take in a prompt.
        tokenizer: The thread in which the decoder's tokenizer is used.
        plain: Knows what the server would obey; used in that thread, too.
        decoder: The tokenizer, which counts rows.
    """

    def __init__(
        self,
        read: ReadRequest,
        request: CompressedRequest,
        segments: Sequence[Segment],
        max_rows: int,
        tokenizer: OffLoop,
        plain: PlainText,
        decoder: Any,
    ) -> None:
        self._read = read
        self._request = request
        self._segments = {segment.id: segment for segment in segments}
        self._expanded: dict[str, SpanReport] = {}
        self._room = max_rows - sum(segment.report.rows for segment in segments)
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._plain = plain
        self._turns: list[Body] = []
        self._rounds = 0

    async def run(self, ask: Callable[[CompressedRequest], Awaitable[Answer]]) -> tuple[CompressedRequest, Answer]:
        """Ask until there is an answer for the client.

        Args:
            ask: Asks the backend.

        Returns:
            The last request, which tells what was done, and its answer.

        Raises:
            ApiError: What the backend raised; 502, it calls a tool that is not offered and says nothing else.
        """
        while True:
            request = await self._tokenizer.run(self._next_request)
            answer = await ask(request)
            message = _message(answer)
            calls = message.get("tool_calls") if message else None
            own = [call for call in calls if _name(call) == NAME] if isinstance(calls, list) else []
            if not own:
                return request, answer
            if self._rounds == MAX_ROUNDS:
                return request, _without(answer, own)
            self._rounds += 1
            said = message.get("content") if message else None
            self._turns.append(await self._tokenizer.run(functools.partial(self._turn, said, own)))
            for call in own:
                result = await self._tokenizer.run(functools.partial(self._expand, call))
                self._turns.append({"role": "tool", "tool_call_id": call.get("id"), "content": result})

    def _next_request(self) -> CompressedRequest:
        parts = [segment.parts(id in self._expanded) for id, segment in self._segments.items()]
        body = self._read.with_parts(parts)
        body["messages"] = [*body["messages"], *self._turns]
        if self._rounds < MAX_ROUNDS:
            body["tools"] = [*(body.get("tools") or []), TOOL]
        elif not body.get("tools"):
            # A choice among no tools is refused by servers.
            body = {name: value for name, value in body.items() if name not in ("tools", "tool_choice")}
        reports = [self._expanded.get(id, segment.report) for id, segment in self._segments.items()]
        lengths = [len(segment.text) for segment in self._segments.values()]
        return replace(
            self._request,
            body=body,
            content=orjson.dumps(body),
            reports=merged(reports, lengths, self._read.num_segments),
            tool={"rounds": self._rounds, "segments": len(self._segments), "expanded": [*self._expanded]},
        )

    def _turn(self, said: Any, calls: Sequence[Body]) -> Body:
        """The model's own turn, of which the server must obey nothing, either."""
        text = said if isinstance(said, str) else None
        content = self._plain.parts([text]) if text and self._plain.find(text) else text
        empty = {"function": {"name": NAME, "arguments": "{}"}}
        kept = [{**call, **empty} if self._plain.find(str(call.get("function"))) else call for call in calls]
        return {"role": "assistant", "content": content, "tool_calls": kept}

    def _expand(self, call: Body) -> str:
        """What a call is answered; where it names a segment that is still latents, that one is text from now on."""
        wanted = _segment_id(call)
        if wanted not in self._segments or wanted in self._expanded:
            left = ", ".join(id for id in self._segments if id not in self._expanded)
            return f'expected {{"segment_id": …}} with a segment that is not text yet: {left or "none is left"}'
        segment = self._segments[wanted]
        # As text they would be obeyed; in latents they are data.
        if self._plain.find(segment.text):
            return f"{wanted} holds control tokens and cannot be shown as text: answer from what is there"
        shown = segment.as_text(self._num_rows(segment.text))
        if shown.rows - segment.report.rows > self._room:
            return f"there is no room for the text of {wanted}: answer from what is there"
        self._room -= shown.rows - segment.report.rows
        self._expanded[wanted] = shown
        return f"{wanted} is shown as text in its place now"

    def _num_rows(self, text: str) -> int:
        return len(self._decoder(text, add_special_tokens=False)["input_ids"])


def _message(answer: Answer) -> Body | None:
    """The message of a chat's first answer; None where there is none to read."""
    if answer.status != 200 or not isinstance(answer.content, bytes):
        return None
    try:
        message = orjson.loads(answer.content)["choices"][0]["message"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return message if isinstance(message, dict) else None


def _without(answer: Answer, calls: Sequence[Any]) -> Answer:
    """The answer less calls of a tool that is not offered any more, and that its client does not know."""
    assert isinstance(answer.content, bytes)
    body = orjson.loads(answer.content)
    choice = body["choices"][0]
    others = [call for call in choice["message"].pop("tool_calls") if call not in calls]
    if others:
        choice["message"]["tool_calls"] = others
    elif not choice["message"].get("content"):
        raise ApiError(502, f"after {MAX_ROUNDS} rounds the model calls {NAME} again in place of an answer")
    elif choice.get("finish_reason") == "tool_calls":
        choice["finish_reason"] = "stop"
    return replace(answer, content=orjson.dumps(body))


def _name(tool: Any) -> Any:
    """The name of a tool, a tool's choice or a call."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _segment_id(call: Body) -> str:
    """What a call names; "" where its arguments are no such object."""
    try:
        wanted = orjson.loads(call["function"]["arguments"])["segment_id"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return ""
    return wanted if isinstance(wanted, str) else ""
