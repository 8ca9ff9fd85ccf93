"""The gateway's HTTP routes: an OpenAI-compatible API whose prompts may hold memory markers.

Requests without markers go to the backend byte for byte. Errors have OpenAI's shape. What was compressed is told in
`X-Code-Llava-*` headers and, in answers that are not streamed, in the field `code_llava`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.compress.compressor import Compressor
from utils.errors import PromptError
from utils.serving.api_error import ApiError
from utils.serving.bodies import BodyLimits
from utils.serving.compress_request import EXTENSION, CompressedRequest, RequestCompressor
from utils.serving.door import SECURITY_HEADERS, Door, DoorPolicy, json_error
from utils.serving.encoder_queue import EncoderQueue
from utils.serving.json_body import read_object
from utils.serving.memories import Memory, MemoryStore
from utils.serving.metrics import Metrics
from utils.serving.off_loop import OffLoop
from utils.serving.page import PAGE_FILES, add_page
from utils.serving.settings import GatewaySettings, owner_of
from utils.serving.upstream import Upstream, json_object, media_type, retry_after

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_HEADER = "X-Code-Llava-"
# Per-span reports in a header stay below what servers and proxies take; the totals are always there.
_MAX_HEADER_BYTES = 4096
_OPEN_PATHS = ("/healthz", *PAGE_FILES)


class Admission:
    """Checks the key, counts requests and answers; plain ASGI, so that streams and disconnects pass untouched.

    Routes find under `request.state.owner` whose request it is; "" where there are no keys.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._owners = [owner_of(key.encode()) for key in api_keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        with self._metrics.active.track_inprogress():
            owner = self._owner(scope)
            if owner is not None:
                scope.setdefault("state", {})["owner"] = owner
                await self._app(scope, receive, counting_send)
            else:
                error = ApiError(401, "wrong or missing API key", headers={"WWW-Authenticate": "Bearer"})
                await json_error(error)(scope, receive, counting_send)

    def _owner(self, scope: Scope) -> str | None:
        """Whose request this is; None for one that may not enter."""
        if not self._owners or scope["path"] in _OPEN_PATHS:
            return ""
        given = owner_of(dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer "))
        # Constant time: the answer's delay must tell neither how much of a guess is right nor whose key it is.
        matches = [owner for owner in self._owners if hmac.compare_digest(given, owner)]
        return matches[0] if matches else None


def create_app(
    settings: GatewaySettings, compressor: Compressor, backend: httpx.AsyncBaseTransport | None = None
) -> FastAPI:
    """Build the application.

    Args:
        settings: Backend, limits, keys.
        compressor: The checkpoint whose decoder the backend serves.
        backend: A backend in this process, see `LocalBackend`; None: a server at the settings' address.
    """
    policy = DoorPolicy(settings.host, settings.allowed_hosts, settings.allowed_origins)
    metrics = Metrics()
    upstream = Upstream(
        settings.backend_url, settings.backend_key, settings.timeout_s, backend, settings.max_answer_bytes
    )
    queue = EncoderQueue(compressor, settings.max_waiting, settings.max_batch_tokens, metrics.note_batch)
    metrics.watch_queue(lambda: queue.num_waiting)
    memories = MemoryStore(
        settings.max_memories, settings.max_memories_bytes, settings.memory_ttl_s, len(settings.api_keys)
    )
    requests = RequestCompressor(compressor, queue, memories, settings, is_local=backend is not None)
    long_work = OffLoop("answers")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()
        requests.close()
        long_work.close()
        await upstream.close()

    app = FastAPI(title="Code-LLaVA gateway", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)

    # The last one comes first: the door needs no key, and no body is read before the key.
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Admission, api_keys=settings.api_keys, metrics=metrics)
    app.add_middleware(Door, policy=policy)
    add_page(app)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return json_error(error)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return json_error(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(PromptError)
    async def prompt_error(_: Request, error: PromptError) -> Response:
        return json_error(ApiError(400, str(error)))

    @app.exception_handler(Exception)
    async def own_error(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return json_error(ApiError(500, "the gateway failed; its log says why", headers=SECURITY_HEADERS))

    async def forward(
        request: Request, path: str, compress: Callable[[bytes, str], Coroutine[Any, Any, CompressedRequest]]
    ) -> Response:
        raw = await _read_body(request)
        compressed = await _unless_gone(request, compress(raw, request.state.owner))
        metrics.note_spans(compressed.spans)
        metrics.fallbacks.inc(compressed.fallback)
        answer = await _unless_gone(request, upstream.post(path, compressed.content))
        kind = media_type(answer)
        headers = _report_headers(compressed)
        if kind.startswith("text/event-stream"):
            pieces = upstream.pieces(answer)
            return StreamingResponse(pieces, answer.status_code, headers, media_type=kind)
        content = await _unless_gone(request, upstream.whole(answer))
        if compressed.is_ours and answer.status_code == 200:
            content = await long_work.run_if_long(len(content), lambda: _with_report(content, compressed))
        headers |= retry_after(answer)
        return Response(content, answer.status_code, headers, media_type=kind)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await forward(request, "/chat/completions", requests.chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await forward(request, "/completions", requests.completion)

    @app.get("/v1/models")
    async def models() -> Response:
        answer = await upstream.get("/models")
        return Response(answer.content, answer.status_code, media_type=answer.media_type)

    @app.get("/v1/compression")
    async def compression() -> Response:
        return _json(requests.settings_report())

    @app.post("/v1/memories", status_code=201)
    async def add_memory(request: Request) -> Response:
        raw = await _read_body(request)

        def add() -> Memory:
            text = read_object(raw).get("text")
            if not isinstance(text, str) or not text.strip():
                raise ApiError(400, 'expected {"text": "…"} with a text that is not empty')
            return memories.add(text, request.state.owner)

        return _json((await long_work.run_if_long(len(raw), add)).summary(), 201)

    @app.get("/v1/memories")
    async def list_memories(request: Request) -> Response:
        data = [memory.summary() for memory in memories.list(request.state.owner)]
        return _json({"object": "list", "data": data})

    @app.delete("/v1/memories/{memory_id}")
    async def delete_memory(memory_id: str, request: Request) -> Response:
        memories.delete(memory_id, request.state.owner)
        return _json({"id": memory_id, "object": "memory", "deleted": True})

    @app.get("/healthz")
    async def healthz() -> Response:
        try:
            status = (await upstream.get("/models")).status_code
            problem = None if status == 200 else f"the backend answers {status}"
        except ApiError as error:
            problem = str(error)
        return _json({"status": "unavailable" if problem else "ok", "problem": problem}, 503 if problem else 200)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _read_body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ApiError(499, "the client closed the connection") from None


def _with_report(content: bytes, compressed: CompressedRequest) -> bytes:
    answer = json_object(content)
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
    names = ("memory_tokens", "latents", "cached_tokens", "encode_milliseconds")
    headers = {_HEADER + name.replace("_", "-").title(): str(report[name]) for name in names}
    if compressed.fallback:
        headers[_HEADER + "Fallback"] = "plain-text"
    spans = orjson.dumps(report["spans"])
    if len(spans) <= _MAX_HEADER_BYTES:
        headers[_HEADER + "Spans"] = spans.decode()
    return headers


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
