"""What was compressed, told in a streamed answer: in the chunk with the usage, which has no choice.

    data: {"choices": [], "usage": {…}, "code_llava": {…}, …}

Events go on whole, each as soon as it has ended.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator

import orjson

from utils.serving.request_options import EXTENSION
from utils.serving.rewriter import CompressedRequest

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
# Whether an event is worth a closer look.
_WITHOUT_CHOICE = re.compile(rb'"choices": ?\[\]')
_DATA = b"data:"
# A server that ends no event is no reason to keep all it says.
_MAX_HELD_BYTES = 1 << 20


def wants_report(request: CompressedRequest) -> bool:
    """Whether a streamed answer has a chunk with the usage, and there is something to tell."""
    options = request.body.get("stream_options")
    return request.is_ours and isinstance(options, dict) and options.get("include_usage") is True


async def stream_with_report(pieces: AsyncIterator[bytes], request: CompressedRequest) -> AsyncIterator[bytes]:
    """The pieces of a stream, with the report in the chunk that has no choice."""
    held = b""
    try:
        async for piece in pieces:
            held += piece
            ended = b""
            while match := _END.search(held):
                ended += _told(held[: match.start()], request) + match[0]
                held = held[match.end() :]
            if len(held) > _MAX_HELD_BYTES:
                ended, held = ended + held, b""
            if ended:
                yield ended
        if held:
            yield held
    finally:
        # Leaving early ends the backend's work.
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()


def _told(event: bytes, request: CompressedRequest) -> bytes:
    if not (event.startswith(_DATA) and _WITHOUT_CHOICE.search(event)):
        return event
    try:
        chunk = orjson.loads(event.removeprefix(_DATA))
        if not isinstance(chunk, dict) or chunk.get("choices") != []:
            return event
        return _DATA + b" " + orjson.dumps({**chunk, EXTENSION: request.report()})
    except (orjson.JSONDecodeError, TypeError):
        return event
