"""The local decoder in the place of a server: an httpx transport, so that `Upstream` talks to it as to any backend.

It answers `/v1/models`, `/v1/chat/completions` and `/v1/completions`, streamed or whole, one request at a time and in
the order they came. The fields it honours are in `utils/serving/local_request.py`; any other is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson

from utils.client.completion import Completion
from utils.errors import CodeLlavaError, PromptError
from utils.serving.api_error import ApiError, error_body
from utils.serving.json_body import read_object
from utils.serving.local_decoder import LocalDecoder
from utils.serving.local_request import LocalRequest
from utils.serving.off_loop import OffLoop

logger = logging.getLogger(__name__)

# Never looked up: requests to it end in the transport.
LOCAL_URL = "http://local"


class LocalBackend(httpx.AsyncBaseTransport):
    """One decoder and its line of requests.

    Args:
        decoder: Answers.
        max_waiting: Requests that may wait; more are told to come back.
    """

    def __init__(self, decoder: LocalDecoder, max_waiting: int = 256) -> None:
        self._decoder = decoder
        self._max_waiting = max_waiting
        self._running: set[_Run] = set()
        # Its one thread is the line, and keeps the tokenizer to itself.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._reader = OffLoop("reader")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; errors have the API's shape."""
        try:
            if request.url.path.endswith("/models"):
                return _json(self._models())
            content = await request.aread()
            wanted = await self._reader.run_if_long(len(content), lambda: self._read(request.url.path, content))
            return await self._answer(wanted)
        except ApiError as error:
            return _json(error.body(), error.status, error.headers)
        except PromptError as error:
            return _json(error_body(str(error), 400), 400)
        except CodeLlavaError as error:
            return _json(error_body(str(error), 500), 500)

    async def aclose(self) -> None:
        """End what runs at its next token, and the thread."""
        for run in self._running:
            run.cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _read(self, path: str, content: bytes) -> LocalRequest:
        return LocalRequest.read(path, read_object(content), self._decoder.name)

    async def _answer(self, wanted: LocalRequest) -> httpx.Response:
        if len(self._running) > self._max_waiting:
            raise ApiError(429, f"{len(self._running)} requests wait: try again later", headers={"Retry-After": "1"})
        run = _Run(wanted)
        self._running.add(run)
        self._thread.submit(run.work, self._decoder).add_done_callback(
            lambda _: run.call_soon(self._running.discard, run)
        )
        try:
            prompt_tokens = await run.next_event()
            shape = _Shape(wanted, self._decoder.name, prompt_tokens)
            if wanted.stream:
                return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=_Events(run, shape))
            texts = []
            while isinstance(event := await run.next_event(), str):
                texts.append(event)
            return _json(shape.whole("".join(texts), event))
        except BaseException:
            # The client has gone, or the prompt was refused.
            run.cancelled.set()
            raise

    def _models(self) -> dict[str, Any]:
        decoder = self._decoder
        entry = {"id": decoder.name, "object": "model", "owned_by": "local", "max_model_len": decoder.max_model_len}
        return {"object": "list", "data": [entry]}


class _Run:
    """One answer in work: the decoder's thread writes events, the event loop reads them.

    The events are the number of prompt rows, pieces of text, and the `Completion`; an exception in place of any.
    """

    def __init__(self, wanted: LocalRequest) -> None:
        self.cancelled = threading.Event()
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def work(self, decoder: LocalDecoder) -> None:
        """What the thread does."""
        if self.cancelled.is_set():
            return
        try:
            rows_TD = self._wanted.rows(decoder)
            # Before a stream has begun, while a refusal still has a status.
            decoder.check_room(len(rows_TD), self._wanted.sampling)
            self._tell(len(rows_TD))
            self._tell(decoder.answer(rows_TD, self._wanted.sampling, self._tell, self.cancelled))
        except Exception as error:  # whatever it is, it belongs to this request and not to the thread
            self._tell(error)

    async def next_event(self) -> Any:
        """The next event; exceptions of the thread are raised here."""
        event = await self._events.get()
        if isinstance(event, ApiError | CodeLlavaError):
            raise event
        if isinstance(event, Exception):
            logger.error("the local decoder failed", exc_info=event)
            raise ApiError(500, f"the local decoder failed ({type(event).__name__}); the log says why")
        return event

    def call_soon(self, action: Any, *arguments: Any) -> None:
        """Let the event loop do something, if there still is one."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action, *arguments)

    def _tell(self, event: Any) -> None:
        self.call_soon(self._events.put_nowait, event)


class _Events(httpx.AsyncByteStream):
    """A streamed answer as server-sent events; closing it early cancels the run."""

    def __init__(self, run: _Run, shape: _Shape) -> None:
        self._run = run
        self._shape = shape

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            yield _event(self._shape.piece("", first=True))
            while isinstance(event := await self._run.next_event(), str):
                yield _event(self._shape.piece(event))
            for piece in self._shape.ending(event):
                yield _event(piece)
            yield b"data: [DONE]\n\n"
        except (ApiError, CodeLlavaError) as error:
            yield _event(error_body(str(error), getattr(error, "status", 500)))
        finally:
            self._run.cancelled.set()

    async def aclose(self) -> None:
        """Cancel the run."""
        self._run.cancelled.set()


class _Shape:
    """The JSON of one answer, whole or in pieces, in the chat's or the completion's shape."""

    def __init__(self, wanted: LocalRequest, model: str, prompt_tokens: int) -> None:
        self._wanted = wanted
        self._prompt_tokens = prompt_tokens
        kind = "chat.completion" if wanted.chat else "text_completion"
        prefix = "chatcmpl" if wanted.chat else "cmpl"
        self._object = kind + (".chunk" if wanted.chat and wanted.stream else "")
        self._common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, answer: Completion) -> dict[str, Any]:
        """An answer that is not streamed."""
        said: dict[str, Any] = {"text": text}
        if self._wanted.chat:
            said = {"message": {"role": "assistant", "content": text}}
        return self._body([self._choice(said, answer.finish_reason)], usage=self._usage(answer))

    def piece(self, text: str, first: bool = False) -> dict[str, Any]:
        """One piece of a stream."""
        role = {"role": "assistant"} if first else {}
        return self._body([self._choice({"delta": role | {"content": text}} if self._wanted.chat else {"text": text})])

    def ending(self, answer: Completion) -> list[dict[str, Any]]:
        """The last pieces: why it ended, and the usage where it was asked for."""
        last = self._choice({"delta": {}} if self._wanted.chat else {"text": ""}, answer.finish_reason)
        usage = [self._body([], usage=self._usage(answer))] if self._wanted.include_usage else []
        return [self._body([last]), *usage]

    def _choice(self, said: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "finish_reason": finish_reason, "logprobs": None, **said}

    def _body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._common, "object": self._object, "choices": choices, **more}

    def _usage(self, answer: Completion) -> dict[str, int]:
        new = answer.completion_tokens or 0
        total = self._prompt_tokens + new
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": new, "total_tokens": total}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> httpx.Response:
    content = {"Content-Type": "application/json", **(headers or {})}
    return httpx.Response(status, headers=content, content=orjson.dumps(value))
