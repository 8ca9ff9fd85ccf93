"""Who answers the questions: four backends behind one protocol.

| name | where | the context arrives as |
|---|---|---|
| `server-text` | an OpenAI-compatible server | text |
| `local-text` | a causal language model in this process | text |
| `server-memory` | a vLLM server that takes prompt embeddings; the encoder runs here | latents |
| `local-memory` | a Code-LLaVA checkpoint in this process | latents |

This is RULER's only door to `utils.inference`; heavy imports happen when a backend is built. A backend raises
`TransientError` for what another try may cure, `RowRefusedError` for a row that no try will, and any other
`CodeLlavaError` for what stops the whole run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruler.answering.protocol import (
    BACKENDS,
    Answer,
    Backend,
    BackendSettings,
    Question,
    RowRefusedError,
    Sampling,
    TransientError,
)
from utils.errors import CheckpointError, ConfigError
from utils.pretrained import fetch, loading, read_model, read_tokenizer

if TYPE_CHECKING:
    from utils.compress.latent_cache import LatentCache
    from utils.compress.prompt_embeds import PromptEmbeds
    from utils.model.prompt import MemoryPrompt

_REFUSED_STATUS = (400, 413, 422)
_TRANSIENT_STATUS = (408, 409, 425)


def open_backend(settings: BackendSettings) -> Backend:
    """Build the backend that the settings name.

    Raises:
        ConfigError: No such backend, or a setting that it cannot use.
        CheckpointError: A local model cannot be loaded.
    """
    builders: dict[str, Callable[[BackendSettings], Backend]] = {
        "server-text": ServerText,
        "local-text": lambda chosen: LocalCausalLm(chosen) if _is_plain_model(chosen.model) else LocalCodeLlava(chosen),
        "server-memory": ServerMemory,
        "local-memory": LocalCodeLlava,
    }
    if settings.name not in builders:
        raise ConfigError(f"unknown backend {settings.name!r}: expected one of {', '.join(BACKENDS)}")
    return builders[settings.name](settings)


def decoder_folder(model: str | None) -> Path:
    """Where a local model's tokenizer is: the folder itself, or the decoder inside a Code-LLaVA checkpoint.

    Args:
        model: Folder or hub id; None for the embedded default checkpoint.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    from utils.checkpoint.locate import find_checkpoint

    return Path(str(model)) if _is_plain_model(model) else find_checkpoint(model).decoder


class ServerText:
    """Sends prompts as text to `/v1/completions`, or as user turns to `/v1/chat/completions`."""

    batch_size = 1

    def __init__(self, settings: BackendSettings) -> None:
        from utils.client.server_client import VllmClient

        self.concurrency = settings.concurrency
        self.details: dict[str, Any] = {}
        self._settings = settings
        # The runner owns the retries: a second layer inside the client would multiply them.
        self._client = VllmClient(
            settings.server_url,
            model=settings.model,
            api_key=settings.api_key,
            timeout_s=settings.timeout_s,
            max_retries=0,
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
        with _sorted_failures():
            if self._settings.api == "chat":
                reply = await self._client.chat(self._settings.messages(question.text), **self._fields(question))
            else:
                reply = await self._client.complete(question.text, **self._fields(question))
        return Answer(text=reply.text, prompt_tokens=reply.prompt_tokens)

    def _fields(self, question: Question) -> dict[str, Any]:
        """The request's further fields; None is left out."""
        sampling = self._settings.sampling
        return {
            "max_tokens": question.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
            # Not OpenAI's, but vLLM's and SGLang's; left out at "no limit" so that OpenAI accepts the request.
            "top_k": sampling.top_k or None,
        }


def _latent_cache(settings: BackendSettings) -> LatentCache | None:
    from utils.compress.latent_cache import LatentCache

    return LatentCache.open_if_usable(settings.cache_dir) if settings.cache else None


class ServerMemory(ServerText):
    """Compresses contexts here and sends whole prompts as embeddings to a vLLM server's `/v1/completions`.

    A chat's template is applied here too: the server joins the parts of a chat in its own way, which can change ids.
    """

    def __init__(self, settings: BackendSettings) -> None:
        from utils.checkpoint.settings import EncoderSettings
        from utils.compress.compressor import Compressor

        super().__init__(settings)
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
        # What a retry sends again; emptied with the answer.
        self._encoded: dict[Question, PromptEmbeds] = {}

    async def _ask(self, question: Question) -> Answer:
        if question not in self._encoded:
            async with self._encoder_free:
                self._encoded[question] = await asyncio.to_thread(self._compress, question)
        embeds = self._encoded[question]
        with _sorted_failures():
            reply = await self._client.complete(embeds.values_TD, **self._fields(question))
        del self._encoded[question]
        return Answer(
            text=reply.text,
            prompt_tokens=embeds.stats.prompt_tokens,
            memory_tokens=embeds.stats.memory_tokens,
            num_latents=embeds.stats.num_latents,
        )

    def _compress(self, question: Question) -> PromptEmbeds:
        return self._compressor.compress([parse_prompt(self._compressor, question.memory_text, self._settings)])[0]


@contextlib.contextmanager
def _sorted_failures() -> Iterator[None]:
    """Sort a failed request: worth another try, this row cannot be answered, or nothing can (passed on as it is)."""
    from utils.client.connection import RequestError

    try:
        yield
    except RequestError as error:
        if error.unreachable:
            message = f"{error}: start the server, or name another address with --server-url"
            raise TransientError(message, unreachable=True) from None
        if error.status in _REFUSED_STATUS:
            raise RowRefusedError(str(error)) from None
        # Without a status there was no whole answer: a time-out, or a body that is no completion.
        if error.transient or error.status is None or error.status in _TRANSIENT_STATUS:
            raise TransientError(str(error), retry_after_s=error.retry_after_s) from None
        raise


class LocalCodeLlava:
    """A Code-LLaVA checkpoint in this process: contexts as latents, or as text for its bare decoder."""

    concurrency = 1

    def __init__(self, settings: BackendSettings) -> None:
        from utils.checkpoint.locate import find_checkpoint
        from utils.inference.inference import load_model

        self.batch_size = settings.batch_size
        self._settings = settings
        self._sampling = settings.sampling
        self._compress = settings.name == "local-memory"
        files = find_checkpoint(settings.model, settings.chunk_size)
        self.details: dict[str, Any] = {"model": files.root.name, "fingerprint": files.fingerprint}
        self._model, self._tokenizer, self._processor = load_model(
            files.root, settings.device, settings.chunk_size, cache=_latent_cache(settings) if self._compress else None
        )
        if self._compress:
            self.details["chunk_size"] = self._processor.chunk_size

    async def start(self) -> None:
        """Nothing to find out: the checkpoint is loaded."""

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer as one batch, beside the event loop."""
        return await asyncio.to_thread(self._answer, questions)

    async def close(self) -> None:
        """The model goes with this object."""

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        texts = [question.memory_text if self._compress else question.text for question in questions]
        prompts = [parse_prompt(self._processor, text, self._settings) for text in texts]
        max_tokens = max(question.max_tokens for question in questions)
        generated = self._model.generate(prompts, max_new_tokens=max_tokens, **_sampling_arguments(self._sampling))
        return [
            Answer(
                text=_until_stop(self._tokenizer.decode(ids, skip_special_tokens=True), self._sampling),
                prompt_tokens=len(prompt.input_ids),
                memory_tokens=prompt.memory_tokens if self._compress else None,
                num_latents=prompt.num_latents if self._compress else None,
            )
            for prompt, ids in zip(prompts, generated, strict=True)
        ]


def parse_prompt(processor: Any, text: str, settings: BackendSettings) -> MemoryPrompt:
    """Parse a text, as it is or as a user turn, with a `Processor` or a `Compressor`."""
    if settings.api == "chat":
        return processor.parse_chat(settings.messages(text))
    return processor.parse_raw(text)


class LocalCausalLm:
    """Any Hugging Face causal language model in this process, from a folder or by hub id."""

    concurrency = 1

    def __init__(self, settings: BackendSettings) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from utils.checkpoint.load import check_report

        self.batch_size = settings.batch_size
        self._settings = settings
        self._sampling = settings.sampling
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            folder = fetch(str(settings.model))
            self._tokenizer = read_tokenizer(folder, padding_side="left")
            model, report = read_model(AutoModelForCausalLM, folder)
            check_report(report, folder)
        except CheckpointError as error:
            raise CheckpointError(f"{settings.model} cannot be loaded as a causal language model: {error}") from None
        self._model = model.to(device).eval()
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.details: dict[str, Any] = {"model": Path(str(settings.model)).name}

    async def start(self) -> None:
        """Nothing to find out: the model is loaded."""

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer as one batch, beside the event loop."""
        return await asyncio.to_thread(self._answer, questions)

    async def close(self) -> None:
        """The model goes with this object."""

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        from utils.model.code_llava_model import check_prompt_fits

        texts = [question.text for question in questions]
        chat = self._settings.api == "chat"
        if chat:
            texts = [self._in_template(text) for text in texts]
        # A template writes its own special tokens.
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        max_tokens = max(question.max_tokens for question in questions)
        for question, length in zip(questions, lengths, strict=True):
            check_prompt_fits(length, self._model.config, question.max_tokens)
        ids = self._model.generate(
            **batch.to(self._model.device),
            max_new_tokens=max_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            **_sampling_arguments(self._sampling),
        )
        new = self._tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [
            Answer(text=_until_stop(text, self._sampling), prompt_tokens=length)
            for text, length in zip(new, lengths, strict=True)
        ]

    def _in_template(self, text: str) -> str:
        messages = self._settings.messages(text)
        with loading(self._tokenizer.name_or_path, "has a chat template that cannot write this question"):
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _is_plain_model(model: str | None) -> bool:
    """Whether `--model` is a language model by itself; a Code-LLaVA checkpoint has its `config.json` one floor down."""
    return model is not None and (not Path(model).is_dir() or (Path(model) / "config.json").is_file())


def _sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """Hugging Face generation arguments; plain greedy search at temperature 0."""
    import torch

    if sampling.temperature == 0:
        return {"do_sample": False}
    # Before each batch, so that a resumed run draws what an undisturbed one would have drawn.
    torch.manual_seed(sampling.seed)
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


def _until_stop(text: str, sampling: Sampling) -> str:
    """Cut an answer before the first stop string; a server does this itself."""
    return text[: min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=len(text))]
