"""The checkpoint's decoder in the place of a server: prompts and latents as they are, one request at a time.

    backend = LocalBackend.load(files)
    answer = await backend.ask(request)           # in the API's shape, streamed or whole

The fields that it honours are in `utils/serving/local_request.py`; any other is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson
import torch

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import load_decoder, load_tokenizers
from utils.checkpoint.settings import AUTOMATIC, EncoderSettings
from utils.errors import CodeLlavaError, PromptError
from utils.inference.answer_watch import AnswerPiece
from utils.inference.generation import Generator
from utils.model.splice import splice_spans
from utils.serving.answer_shape import AnswerShape
from utils.serving.api_error import ApiError, error_body
from utils.serving.backend import EVENT_STREAM, Answer
from utils.serving.local_request import LocalRequest
from utils.serving.read_request import CHAT
from utils.serving.rewriter import CompressedRequest

logger = logging.getLogger(__name__)


class LocalBackend:
    """One decoder and its line of requests; see `Backend`.

    Args:
        generator: Answers; its tokenizer is used by no one else.
        name: What requests call the model.
        max_waiting: Requests that may wait; more are told to come back.
    """

    is_local = True

    def __init__(self, generator: Generator, name: str, max_waiting: int = 256) -> None:
        self._generator = generator
        self._name = name
        self._max_waiting = max_waiting
        self._created = int(time.time())
        self._running: set[_Run] = set()
        # Its one thread is the line, and keeps the tokenizer to itself.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    @classmethod
    def load(
        cls, files: CheckpointFiles, settings: EncoderSettings = AUTOMATIC, max_waiting: int = 256
    ) -> LocalBackend:
        """Load a checkpoint's decoder.

        Raises:
            CheckpointError: The decoder cannot be read.
        """
        generator = Generator(load_decoder(files, settings).eval(), load_tokenizers(files).decoder)
        return cls(generator, files.root.name, max_waiting)

    async def models(self) -> Answer:
        """The one model."""
        entry = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "local",
            "max_model_len": self._generator.max_rows,
        }
        return Answer(content=orjson.dumps({"object": "list", "data": [entry]}))

    async def ask(self, request: CompressedRequest) -> Answer:
        """Wait in line, then answer.

        Raises:
            PromptError: The prompt has no room for an answer, or ids that the decoder does not have.
            ApiError: 400 or 404, fields that are not honoured; 413, too many choices for their length; 429, too many
                requests wait; 500, the decoder failed.
        """
        wanted = LocalRequest.read(request.body, request.path == CHAT, self._name)
        if len(self._running) > self._max_waiting:
            raise ApiError(429, f"{len(self._running)} requests wait: try again later", headers={"Retry-After": "1"})
        run = _Run(request, wanted)
        self._running.add(run)
        self._thread.submit(run.work, self._generator).add_done_callback(
            lambda _: run.call_soon(self._running.discard, run)
        )
        try:
            cached_rows = sum(report.cached_rows for report in request.reports)
            shape = AnswerShape(wanted, self._name, await run.next_event(), cached_rows)
            if wanted.stream:
                return Answer(content=_events(run, shape, wanted.n), media_type=EVENT_STREAM)
            pieces = []
            while isinstance(event := await run.next_event(), AnswerPiece):
                pieces.append(event)
            return Answer(content=orjson.dumps(shape.whole(pieces, event)))
        except BaseException:
            # The client has gone, or the prompt was refused.
            run.cancelled.set()
            raise

    async def close(self) -> None:
        """End what runs at its next token, and the thread."""
        for run in self._running:
            run.cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Run:
    """One answer in work: the decoder's thread writes events, the event loop reads them.

    The events are the number of prompt rows, pieces of the choices, and the list of their completions; an exception in
    place of any.
    """

    def __init__(self, request: CompressedRequest, wanted: LocalRequest) -> None:
        self.cancelled = threading.Event()
        (self._prompt,) = request.prompts
        self._latents = [span.latents_ND for span in request.spans]
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def work(self, generator: Generator) -> None:
        """What the thread does."""
        if self.cancelled.is_set():
            return
        try:
            with torch.inference_mode():
                rows_TD = generator.embed(self._prompt.input_ids)
                rows_TD = splice_spans(rows_TD, self._latents, self._prompt.spans)
            # Before a stream has begun, while a refusal still has a status.
            wanted, sampling = self._wanted, self._wanted.sampling
            generator.check_room(len(rows_TD), sampling)
            wanted.check_together(len(rows_TD), generator.max_rows)
            self._tell(len(rows_TD))
            # Choices among which nothing is drawn are the same.
            num_drawn = 1 if sampling.is_greedy else wanted.n
            answers = generator.complete(
                [rows_TD] * num_drawn, sampling, on_piece=self._tell_piece, cancelled=self.cancelled,
                logprobs=wanted.logprobs,
            )  # fmt: skip
            self._tell(answers * (wanted.n // num_drawn))
        except Exception as error:  # whatever it is, it belongs to this request and not to the thread
            self._tell(error)

    async def next_event(self) -> Any:
        """The next event; exceptions of the thread are raised here, in the API's words."""
        event = await self._events.get()
        if isinstance(event, PromptError | ApiError):
            raise event
        if isinstance(event, CodeLlavaError):
            raise ApiError(500, str(event))
        if isinstance(event, Exception):
            logger.error("the local decoder failed", exc_info=event)
            raise ApiError(500, f"the local decoder failed ({type(event).__name__}); the log says why")
        return event

    def call_soon(self, action: Any, *arguments: Any) -> None:
        """Let the event loop do something, if there still is one."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action, *arguments)

    def _tell_piece(self, piece: AnswerPiece) -> None:
        same = range(self._wanted.n) if self._wanted.sampling.is_greedy else [piece.number]
        for number in same:
            self._tell(replace(piece, number=number))

    def _tell(self, event: Any) -> None:
        self.call_soon(self._events.put_nowait, event)


async def _events(run: _Run, shape: AnswerShape, num_choices: int) -> AsyncIterator[bytes]:
    """A streamed answer as server-sent events; leaving early cancels the run."""
    try:
        for number in range(num_choices):
            yield _event(shape.beginning(number))
        while isinstance(event := await run.next_event(), AnswerPiece):
            yield _event(shape.piece(event))
        for piece in shape.ending(event):
            yield _event(piece)
        yield b"data: [DONE]\n\n"
    except (ApiError, PromptError) as error:
        yield _event(error_body(str(error), getattr(error, "status", 400)))
    finally:
        run.cancelled.set()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
