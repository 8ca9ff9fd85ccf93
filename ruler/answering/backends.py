"""Who answers the questions: four backends behind one protocol.

| name | where | the context arrives as |
|---|---|---|
| `server-text` | an OpenAI-compatible server | text |
| `local-text` | a causal language model in this process | text |
| `server-memory` | a vLLM server that takes prompt embeddings; the encoder runs here | latents |
| `local-memory` | a Code-LLaVA checkpoint in this process | latents |

An arm of an evaluation (`utils.compress.arms`) may shorten what arrives as text, or let text stay among the latents.

This is RULER's only door to `utils.inference`; heavy imports happen when a backend is built. A backend raises
`TransientError` for what the client tried again in vain, `RowRefusedError` for a row that no try will cure, and any
other `CodeLlavaError` for what stops the whole run.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruler.answering.protocol import (
    BACKENDS,
    Answer,
    Backend,
    BackendSettings,
    Question,
    RowRefusedError,
    TransientError,
)
from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.settings import EncoderSettings
from utils.client.completion import RetryPolicy
from utils.client.connection import RequestError
from utils.compress.arm_prompts import ArmPrompts, expansion_of
from utils.compress.arms import FULL, NONE, Arm, check_arms
from utils.compress.latent_cache import LatentCache
from utils.errors import CheckpointError, ConfigError
from utils.model.chat import chat_ids
from utils.model.processor import Processor
from utils.model.prompt import with_one_beginning
from utils.pretrained import fetch, read_model, read_tokenizer

if TYPE_CHECKING:
    import torch

    from utils.compress.prompt_embeds import PromptEmbeds
    from utils.model.prompt import MemoryPrompt

_REFUSED_STATUS = (400, 413, 422)


def open_backend(settings: BackendSettings, retry: RetryPolicy | None = None) -> Backend:
    """Build the backend that the settings name; servers are asked as often as `retry` says.

    Raises:
        ConfigError: No such backend, or a setting that it cannot use.
        CheckpointError: A local model cannot be loaded.
    """
    builders: dict[str, Callable[[BackendSettings], Backend]] = {
        "server-text": lambda chosen: ServerText(chosen, retry),
        "local-text": lambda chosen: LocalCausalLm(chosen) if _is_plain_model(chosen.model) else LocalCodeLlava(chosen),
        "server-memory": lambda chosen: ServerMemory(chosen, retry),
        "local-memory": LocalCodeLlava,
    }
    if settings.name not in builders:
        raise ConfigError(f"unknown backend {settings.name!r}: expected one of {', '.join(BACKENDS)}")
    in_latents = settings.name.endswith("memory")
    if settings.expansion is not None and not in_latents:
        raise ConfigError(f"the backend {settings.name} compresses nothing of which a part could stay text")
    if settings.arm is not None and settings.arm.has_latents != in_latents:
        raise ConfigError(f"the backend {settings.name} cannot show a context as the arm {settings.arm.name} wants it")
    return builders[settings.name](settings)


def decoder_folder(model: str | None, arms: Sequence[Arm] = ()) -> Path:
    """Where a local model's tokenizer is: the folder itself, or the decoder inside a Code-LLaVA checkpoint.

    Args:
        model: Folder or hub id; None for the embedded default checkpoint.
        arms: Those that the model is to answer in.

    Raises:
        CheckpointError: There is no such checkpoint.
        ConfigError: It cannot serve one of the arms.
    """
    if _is_plain_model(model):
        return Path(str(model))
    in_latents = [arm for arm in arms if arm.has_latents]
    files = find_checkpoint(model, in_latents[0].latent_size if in_latents else None)
    check_arms(in_latents, files.config)
    return files.decoder


class Contexts:
    """Shows the contexts of questions as the settings' arm wants them.

    Args:
        settings: Of the backend.
        processor: Parses its prompts; None: only the tokenizers of the settings' checkpoint, where the arm needs any.
    """

    def __init__(self, settings: BackendSettings, processor: Processor | None = None) -> None:
        self._settings = settings
        self.expansion = settings.expansion or (expansion_of(settings.arm) if settings.arm else None)
        self._shortens = settings.arm is not None and not (settings.arm.has_latents or settings.arm.kind == FULL)
        if self._shortens and processor is None:
            from utils.checkpoint.load import load_tokenizers

            files = find_checkpoint(settings.checkpoint)
            processor = Processor(tokenizers=load_tokenizers(files), chunk_size=1)
        self._processor = processor
        self._prompts = ArmPrompts(processor) if processor else None

    def prompt(self, question: Question) -> tuple[str, dict[str, int]]:
        """A question's whole prompt as text, and what is known of a context that was shortened."""
        if self._settings.name.endswith("memory"):
            return question.memory_text, {}
        if not self._shortens:
            return question.text, {}
        arm = self._settings.arm
        assert arm is not None
        assert self._prompts is not None
        asks = "" if arm.kind == NONE else parse_prompt(self._processor, question.memory_text, self._settings).query
        shown = self._prompts.shown(arm, question.context, asks)
        counts = {"memory_tokens": self._prompts.num_tokens(question.context), "num_latents": 0}
        return question.with_context(shown), {**counts, "text_rows": self._prompts.num_tokens(shown)}


class ServerText:
    """Sends prompts as text to `/v1/completions`, or as user turns to `/v1/chat/completions`."""

    batch_size = 1

    def __init__(self, settings: BackendSettings, retry: RetryPolicy | None = None) -> None:
        from utils.client.server_client import VllmClient

        self.concurrency = settings.concurrency
        self.details: dict[str, Any] = {}
        self._settings = settings
        self._contexts = Contexts(settings)
        self._client = VllmClient(
            settings.server_url,
            model=settings.model,
            api_key=settings.api_key,
            timeout_s=settings.timeout_s,
            # No row may be lost to a server that is slow or confused for a while.
            retry=replace(retry or RetryPolicy(), unanswered=True),
        )

    async def start(self) -> None:
        """Check that the server is there and fix the model's name."""
        with _sorted_failures():
            served = await self._client.models()
        if self._client.model is None:
            if len(served) != 1:
                names = ", ".join(model.name for model in served) or "no model"
                raise ConfigError(f"{self._client.base_url} serves {names}: name one with --model")
            self._client.model = served[0].name
        self.details["model"] = self._client.model

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask each question with its own request."""
        return [await self._ask(question) for question in questions]

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _ask(self, question: Question) -> Answer:
        text, counts = await asyncio.to_thread(self._contexts.prompt, question)
        with _sorted_failures():
            if self._settings.api == "chat":
                reply = await self._client.chat(self._settings.messages(text), **self._fields(question))
            else:
                reply = await self._client.complete(text, **self._fields(question))
        return Answer(text=reply.text, prompt_tokens=reply.prompt_tokens, **counts)

    def _fields(self, question: Question) -> dict[str, Any]:
        """The request's further fields; None is left out."""
        return replace(self._settings.sampling, max_tokens=question.max_tokens).request_fields()


def _latent_cache(settings: BackendSettings) -> LatentCache | None:
    return LatentCache.open_if_usable(settings.cache_dir) if settings.cache else None


class ServerMemory(ServerText):
    """Compresses contexts here and sends whole prompts as embeddings to a vLLM server's `/v1/completions`.

    A chat's template is applied here too: the server joins the parts of a chat in its own way, which can change ids.
    """

    def __init__(self, settings: BackendSettings, retry: RetryPolicy | None = None) -> None:
        from utils.compress.compressor import Compressor

        super().__init__(settings, retry)
        self._compressor = Compressor.load(
            settings.checkpoint,
            chunk_size=settings.chunk_size,
            settings=EncoderSettings(device=settings.device),
            cache=_latent_cache(settings),
        )
        self.details |= {
            "checkpoint": self._compressor.files.root.name,
            "fingerprint": self._compressor.files.fingerprint,
            "chunk_size": self._compressor.processor.chunk_size,
        }
        self._encoder_free = asyncio.Lock()

    async def _ask(self, question: Question) -> Answer:
        async with self._encoder_free:
            embeds = await asyncio.to_thread(self._compress, question)
        with _sorted_failures():
            reply = await self._client.complete(embeds.values_TD, **self._fields(question))
        return Answer(
            text=reply.text,
            prompt_tokens=embeds.stats.prompt_tokens,
            memory_tokens=embeds.stats.memory_tokens,
            num_latents=embeds.stats.num_latents,
            text_rows=embeds.stats.text_rows if self._contexts.expansion else None,
        )

    def _compress(self, question: Question) -> PromptEmbeds:
        prompt = parse_prompt(self._compressor, question.memory_text, self._settings)
        return self._compressor.compress([prompt], self._contexts.expansion)[0]


@contextlib.contextmanager
def _sorted_failures() -> Iterator[None]:
    """Sort a failed request: worth another try, this row cannot be answered, or nothing can (passed on as it is)."""
    try:
        yield
    except RequestError as error:
        if error.unreachable:
            message = f"{error}: start the server, or name another address with --server-url"
            raise TransientError(message) from None
        if error.status in _REFUSED_STATUS:
            raise RowRefusedError(str(error)) from None
        # Without a status there was no whole answer: a time-out, or a body that is no completion.
        if error.transient or error.status is None:
            raise TransientError(str(error)) from None
        raise


class LocalModel(ABC):
    """A model in this process; a subclass says how a question becomes prompt rows."""

    concurrency = 1

    def __init__(self, settings: BackendSettings, decoder: Any, tokenizer: Any) -> None:
        from utils.inference.generation import Generator

        self.batch_size = settings.batch_size
        self.details: dict[str, Any] = {}
        self._settings = settings
        self._generator = Generator(decoder, tokenizer)

    async def start(self) -> None:  # noqa: B027
        """Nothing to find out: the model is loaded."""

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer as one batch, beside the event loop."""
        return await asyncio.to_thread(self._answer, questions)

    async def close(self) -> None:  # noqa: B027
        """The model goes with this object."""

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        rows, counts = self._read(questions)
        # The seed is set before each batch, so that a resumed run draws what an undisturbed one would have drawn.
        sampling = replace(self._settings.sampling, max_tokens=max(question.max_tokens for question in questions))
        completions = self._generator.complete(rows, sampling)
        return [
            Answer(text=completion.text, prompt_tokens=completion.prompt_tokens, **count)
            for completion, count in zip(completions, counts, strict=True)
        ]

    @abstractmethod
    def _read(self, questions: Sequence[Question]) -> tuple[list[torch.Tensor], list[dict[str, int]]]:
        """Rows [T, D] of each question, and what is known of its memory."""


class LocalCodeLlava(LocalModel):
    """A Code-LLaVA checkpoint in this process: contexts as latents, or as text for its bare decoder."""

    def __init__(self, settings: BackendSettings) -> None:
        from utils.compress.expander import Expander
        from utils.inference.inference import load_model

        compresses = settings.name == "local-memory"
        files = find_checkpoint(settings.model, settings.chunk_size)
        cache = _latent_cache(settings) if compresses else None
        self._model, tokenizer, self._processor = load_model(
            files.root, settings.device, settings.chunk_size, cache=cache
        )
        self._expander = Expander(self._processor.tokenizers, self._model.encode_memory)
        self._contexts = Contexts(settings, self._processor)
        super().__init__(settings, self._model.decoder, tokenizer)
        self.details = {"model": files.root.name, "fingerprint": files.fingerprint}
        if compresses:
            self.details["chunk_size"] = self._processor.chunk_size

    def _read(self, questions: Sequence[Question]) -> tuple[list[torch.Tensor], list[dict[str, int]]]:
        expansion = self._contexts.expansion
        prompts, counts = [], []
        for text, count in map(self._contexts.prompt, questions):
            prompt = self._expander(parse_prompt(self._processor, text, self._settings), expansion)
            prompts.append(prompt)
            if prompt.spans:
                count = {"memory_tokens": prompt.memory_tokens, "num_latents": prompt.num_latents}
                count |= {"text_rows": prompt.text_rows} if expansion else {}
            counts.append(count)
        self._model.check_room(prompts, max(question.max_tokens for question in questions))
        return self._model.embed_prompts(prompts), counts


def parse_prompt(processor: Any, text: str, settings: BackendSettings) -> MemoryPrompt:
    """Parse a text, as it is or as a user turn, with a `Processor` or a `Compressor`."""
    if settings.api == "chat":
        return processor.parse_chat(settings.messages(text))
    return processor.parse_raw(text)


class LocalCausalLm(LocalModel):
    """Any Hugging Face causal language model in this process, from a folder or by hub id."""

    def __init__(self, settings: BackendSettings) -> None:
        from transformers import AutoModelForCausalLM

        from utils.checkpoint.load import check_report, in_fast_dtype, resolve_device

        try:
            folder = fetch(str(settings.model))
            tokenizer = read_tokenizer(folder)
            model, report = read_model(AutoModelForCausalLM, folder)
            check_report(report, folder)
        except CheckpointError as error:
            raise CheckpointError(f"{settings.model} cannot be loaded as a causal language model: {error}") from None
        device = resolve_device(settings.device)
        super().__init__(settings, in_fast_dtype(model, device).to(device).eval(), tokenizer)
        self._tokenizer = tokenizer
        self._contexts = Contexts(settings)
        self.details = {"model": Path(str(settings.model)).name}

    def _read(self, questions: Sequence[Question]) -> tuple[list[torch.Tensor], list[dict[str, int]]]:
        asked = [self._contexts.prompt(question) for question in questions]
        return [self._generator.embed(self._ids(text)) for text, _ in asked], [counts for _, counts in asked]

    def _ids(self, text: str) -> list[int]:
        if self._settings.api == "chat":
            return chat_ids(self._settings.messages(text), self._tokenizer)
        return with_one_beginning(list(self._tokenizer(text)["input_ids"]), self._tokenizer)


def _is_plain_model(model: str | None) -> bool:
    """Whether `--model` is a language model by itself; a Code-LLaVA checkpoint has its `config.json` one floor down."""
    return model is not None and (not Path(model).is_dir() or (Path(model) / "config.json").is_file())
