"""The gateway and its HTTP routes: an OpenAI-compatible API whose prompts may hold memory markers.

Requests without markers go to the backend byte for byte. Errors have OpenAI's shape. What was compressed is told in
`X-Code-Llava-*` headers and, in answers that are not streamed, in the field `code_llava`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from utils.compress.compressor import Compressor
from utils.errors import PromptError
from utils.serving.admission import PAGE_FILES, Admission
from utils.serving.api_error import ApiError, shown
from utils.serving.backend import Backend
from utils.serving.bodies import BodyLimits
from utils.serving.compress_request import RequestCompressor
from utils.serving.door import SECURITY_HEADERS, Door, DoorPolicy
from utils.serving.encoder_queue import EncoderQueue
from utils.serving.json_body import read_object
from utils.serving.memories import Memory, MemoryStore
from utils.serving.metrics import Metrics
from utils.serving.model_names import with_variants
from utils.serving.off_loop import OffLoop
from utils.serving.read_request import CHAT, COMPLETIONS
from utils.serving.request_options import EXTENSION
from utils.serving.rewriter import CompressedRequest, Rewriter
from utils.serving.selected_text import TextSelector
from utils.serving.settings import GatewaySettings
from utils.serving.stream_report import stream_with_report, wants_report
from utils.serving.text_requests import TextRequests

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_HEADER = "X-Code-Llava-"
# Lists in a header stay below what servers and proxies take; the totals are always there.
_MAX_HEADER_BYTES = 4096


class Gateway:
    """What lives as long as the gateway: queue, memories, counters, threads; and what each route does.

    Args:
        settings: Limits, keys and policies.
        compressor: Of the checkpoint whose decoder the backend serves; a selector for one that reads text only.
        backend: Answers.
    """

    def __init__(self, settings: GatewaySettings, compressor: Compressor | TextSelector, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend
        self._metrics = Metrics()
        self._memories = MemoryStore(
            settings.max_memories, settings.max_memories_bytes, settings.memory_ttl_s, len(settings.api_keys)
        )
        self._requests = self._rewriter(compressor)
        self._long_work = OffLoop("answers")

    def app(self) -> FastAPI:
        """The application."""
        settings = self._settings
        app = FastAPI(
            title="Code-LLaVA gateway", lifespan=self._lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
        )
        # The last one comes first: the door needs no key, and no body is read before the key.
        app.add_middleware(BodyLimits, settings=settings)
        app.add_middleware(Admission, api_keys=settings.api_keys, metrics=self._metrics)
        app.add_middleware(Door, policy=DoorPolicy(settings.host, settings.allowed_hosts, settings.allowed_origins))
        for kind in (ApiError, PromptError, HTTPException, Exception):
            app.add_exception_handler(kind, _refuse)
        for path in PAGE_FILES:
            app.add_api_route(path, _page_file(path))
        for method, path, endpoint in (
            ("POST", "/v1" + CHAT, self.chat),
            ("POST", "/v1" + COMPLETIONS, self.completions),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model_id:path}", self.model),
            ("GET", "/v1/compression", self.compression),
            ("POST", "/v1/compress", self.compress),
            ("GET", "/v1/retrieve/{memory_id}", self.retrieve),
            ("POST", "/v1/memories", self.add_memory),
            ("GET", "/v1/memories", self.list_memories),
            ("DELETE", "/v1/memories/{memory_id}", self.delete_memory),
            ("GET", "/healthz", self.health),
            ("GET", "/metrics", self.metrics),
        ):
            app.add_api_route(path, endpoint, methods=[method])
        return app

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._forward(request, CHAT)

    async def completions(self, request: Request) -> Response:
        """Continue a prompt."""
        return await self._forward(request, COMPLETIONS)

    async def models(self) -> Response:
        """Show the backend's models, each with its variants of this gateway."""
        listing = await self._models()
        return listing if isinstance(listing, Response) else _json({"object": "list", "data": listing})

    async def model(self, model_id: str) -> Response:
        """Show one of the backend's models."""
        listing = await self._models()
        if isinstance(listing, Response):
            return listing
        entry = next((entry for entry in listing if entry["id"] == model_id), None)
        if entry is None:
            served = ", ".join(shown(entry["id"]) for entry in listing if EXTENSION not in entry)
            raise ApiError(404, f"the model {shown(model_id)} does not exist: this server has {served or 'none'}")
        return _json(entry)

    async def _models(self) -> list[dict[str, Any]] | Response:
        """The models with their variants; the backend's own answer where that is no list of models."""
        answer = await self._backend.models()
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            if answer.status == 200 and isinstance(answer.content, bytes):
                return with_variants(orjson.loads(answer.content)["data"], self._requests.chunk_sizes)
        return Response(answer.content, answer.status, media_type=answer.media_type)

    async def compression(self) -> Response:
        """Show the checkpoint and the limits."""
        return _json(self._requests.settings_report())

    async def compress(self, request: Request) -> Response:
        """Compress a chat's messages, and give them back."""
        raw = await _read_body(request)
        work = self._requests.compress_messages(raw, request.state.owner, may_mark=_may_mark(request))
        answer, compressed = await _unless_gone(request, work)
        self._metrics.note_spans(compressed.reports)
        self._metrics.fallbacks.inc(compressed.fallback)
        return await self._long_work.run_if_long(len(raw), lambda: _json(answer))

    async def retrieve(self, memory_id: str, request: Request) -> Response:
        """Show the whole text of what was compressed, or was stored."""
        memory = self._memories.get(memory_id, request.state.owner)
        return _json({**memory.summary(), "original_content": memory.text})

    async def add_memory(self, request: Request) -> Response:
        """Store a text."""
        raw = await _read_body(request)

        def add() -> Memory:
            text = read_object(raw).get("text")
            if not isinstance(text, str) or not text.strip():
                raise ApiError(400, 'expected {"text": "…"} with a text that is not empty')
            return self._memories.add(text, request.state.owner)

        return _json((await self._long_work.run_if_long(len(raw), add)).summary(), 201)

    async def list_memories(self, request: Request) -> Response:
        """Show the key's own texts."""
        data = [memory.summary() for memory in self._memories.list(request.state.owner)]
        return _json({"object": "list", "data": data})

    async def delete_memory(self, memory_id: str, request: Request) -> Response:
        """Forget a text."""
        self._memories.delete(memory_id, request.state.owner)
        return _json({"id": memory_id, "object": "memory", "deleted": True})

    async def health(self) -> Response:
        """Say whether the backend answers."""
        try:
            status = (await self._backend.models()).status
            problem = None if status == 200 else f"the backend answers {status}"
        except ApiError as error:
            problem = str(error)
        return _json({"status": "unavailable" if problem else "ok", "problem": problem}, 503 if problem else 200)

    async def metrics(self) -> Response:
        """Show the counters."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _rewriter(self, compressor: Compressor | TextSelector) -> Rewriter:
        if isinstance(compressor, TextSelector):
            return TextRequests(compressor, self._memories, self._settings)
        limits = self._settings.max_waiting, self._settings.max_batch_tokens
        queue = EncoderQueue(compressor, *limits, self._metrics.note_batch)
        self._metrics.watch_queue(lambda: queue.num_waiting)
        return RequestCompressor(compressor, queue, self._memories, self._settings, self._backend.is_local)

    async def _forward(self, request: Request, path: str) -> Response:
        raw = await _read_body(request)
        compressed = await _unless_gone(request, self._compress(path, raw, request))
        if compressed.loop is not None:
            compressed, answer = await _unless_gone(request, compressed.loop.run(self._backend.ask))
            self._metrics.note_spans(compressed.reports)
        else:
            self._metrics.note_spans(compressed.reports)
            self._metrics.fallbacks.inc(compressed.fallback)
            answer = await _unless_gone(request, self._backend.ask(compressed))
        headers = {**_report_headers(compressed), **answer.headers}
        content = answer.content
        if not isinstance(content, bytes):
            if answer.status == 200 and wants_report(compressed):
                content = stream_with_report(content, compressed)
            return StreamingResponse(content, answer.status, headers, media_type=answer.media_type)
        if compressed.is_ours and answer.status == 200:
            with_report = functools.partial(_with_report, content, compressed)
            content = await self._long_work.run_if_long(len(content), with_report)
        return Response(content, answer.status, headers, media_type=answer.media_type)

    async def _compress(self, path: str, raw: bytes, request: Request) -> CompressedRequest:
        return await self._requests.compress(path, raw, request.state.owner, may_mark=_may_mark(request))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self._requests.close()
        self._long_work.close()
        await self._backend.close()


def _page_file(path: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    name, media_type = PAGE_FILES[path]
    content = (Path(__file__).parent / "page" / name).read_bytes()

    async def page_file() -> Response:
        return Response(content, headers={"Cache-Control": "no-cache"}, media_type=media_type)

    return page_file


async def _refuse(request: Request, error: Exception) -> Response:
    """Any failure in the API's words."""
    if isinstance(error, PromptError):
        error = ApiError(400, str(error))
    elif isinstance(error, HTTPException):
        message = f"{request.method[:20]} {request.url.path[:200]}: {error.detail}"
        error = ApiError(error.status_code, message, headers=error.headers)
    elif not isinstance(error, ApiError):
        logger.error("a request failed", exc_info=error)
        error = ApiError(500, "the gateway failed; its log says why", headers=SECURITY_HEADERS)
    return error.response()


def _may_mark(request: Request) -> bool:
    """What proxies can say that cannot touch bodies."""
    return request.headers.get(_HEADER + "Auto", "").strip().lower() != "off"


async def _read_body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ApiError(499, "the client closed the connection") from None


def _with_report(content: bytes, compressed: CompressedRequest) -> bytes:
    try:
        answer = orjson.loads(content)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise ApiError(502, "the backend's answer is no JSON object")
    try:
        return orjson.dumps({**answer, EXTENSION: compressed.report()})
    except TypeError:  # nested deeper than can be written
        raise ApiError(502, "the backend's answer is nested too deeply") from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; when the client goes away first, the work is cancelled, and with it the backend's."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            # No one reads this; 499 is what proxies log for it.
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)


def _report_headers(compressed: CompressedRequest) -> dict[str, str]:
    if not compressed.is_ours:
        return {}
    report = compressed.report()
    names = ("mode", "memory_tokens", "latents", "text_rows", "cached_tokens", "encode_milliseconds")
    headers = {_HEADER + name.replace("_", "-").title(): str(report[name]) for name in names}
    if compressed.fallback:
        headers[_HEADER + "Fallback"] = "plain-text"
    spans = [{name: value for name, value in span.items() if name != "segments"} for span in report["spans"]]
    lists: dict[str, list[Any]] = {"Spans": spans}
    if report["text_rows"]:
        segments = [span["segments"] for span in report["spans"]]
        lists["Text-Chars"] = [[chars for segment in own for chars in segment["chars"]] for own in segments]
    for name, value in lists.items():
        if len(content := orjson.dumps(value)) <= _MAX_HEADER_BYTES:
            headers[_HEADER + name] = content.decode()
    return headers


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
