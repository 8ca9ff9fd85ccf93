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
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruler.protocol import (
    BACKENDS,
    Answer,
    Backend,
    BackendSettings,
    Question,
    RowRefusedError,
    Sampling,
    TransientError,
)
from utils.errors import CheckpointError, ConfigError, ServerError

if TYPE_CHECKING:
    from utils.model.prompt import MemoryPrompt

logger = logging.getLogger(__name__)

_REFUSED_STATUS = (400, 413, 422)
_TRANSIENT_STATUS = (408, 409, 425, 429)


def open_backend(settings: BackendSettings) -> Backend:
    """Build the backend that the settings name.

    Raises:
        ConfigError: No such backend, or a setting that it cannot use.
        CheckpointError: A local model cannot be loaded.
    """
    builders: dict[str, Callable[[BackendSettings], Backend]] = {
        "server-text": ServerText,
        "local-text": lambda chosen: LocalCausalLm(chosen) if _is_plain_model(chosen.model) else LocalCodeLlava(chosen),
        "local-memory": LocalCodeLlava,
    }
    if settings.name not in builders:
        raise ConfigError(f"unknown backend {settings.name!r}: expected one of {', '.join(BACKENDS)}")
    return builders[settings.name](settings)


class ServerText:
    """Sends prompts as text to `/v1/completions` or `/v1/chat/completions`."""

    batch_size = 1

    def __init__(self, settings: BackendSettings) -> None:
        import openai

        self.concurrency = settings.concurrency
        self.details: dict[str, Any] = {}
        self._settings = settings
        # The runner owns the retries: a second layer inside the client would multiply them.
        self._client = openai.AsyncOpenAI(
            base_url=settings.server_url.rstrip("/").removesuffix("/v1") + "/v1",
            api_key=settings.api_key or os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY") or "EMPTY",
            timeout=settings.timeout_s,
            max_retries=0,
        )
        self._model = settings.model or ""

    async def start(self) -> None:
        """Choose the server's only model where none is named; a server that is not there is an error at once."""
        try:
            listing = await self._call(self._client.models.list)
        except TransientError as error:
            if error.unreachable:
                raise ServerError(f"{error}: start the server, or name another address with --server-url") from None
            if not self._model:
                raise
            logger.info("%s (going on with model %s)", error, self._model)
        else:
            names = [model.id for model in getattr(listing, "data", None) or []]
            if not self._model:
                if len(names) != 1:
                    raise ConfigError(f"{self._client.base_url} serves {names or 'no model'}: name one with --model")
                self._model = names[0]
        self.details["model"] = self._model

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask each question with its own request."""
        return [await self._ask(question) for question in questions]

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _ask(self, question: Question) -> Answer:
        sampling = self._settings.sampling
        common: dict[str, Any] = {
            "model": self._model,
            "max_tokens": question.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
            # Not OpenAI's, but vLLM's and SGLang's; left out at "no limit" so that OpenAI accepts the request.
            "extra_body": {"top_k": sampling.top_k} if sampling.top_k > 0 else None,
        }
        if self._settings.api == "chat":
            messages = self._settings.messages(question.text)
            reply = await self._call(self._client.chat.completions.create, messages=messages, **common)
            return _read_reply(reply, lambda choice: choice.message.content or "")
        reply = await self._call(self._client.completions.create, prompt=question.text, **common)
        return _read_reply(reply, lambda choice: choice.text)

    async def _call(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """Call the server and sort its failures into the three kinds."""
        import openai

        where = str(self._client.base_url)
        try:
            return await method(**arguments)
        except openai.APIStatusError as error:
            message = f"{where}: HTTP {error.status_code}: {_short(error.response.text)}"
            if error.status_code in _REFUSED_STATUS:
                raise RowRefusedError(message) from None
            if error.status_code in _TRANSIENT_STATUS or error.status_code >= 500:
                raise TransientError(
                    message, retry_after_s=_seconds(error.response.headers.get("retry-after"))
                ) from None
            raise ServerError(message) from None
        except openai.APITimeoutError:
            raise TransientError(f"{where}: no answer within {self._settings.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            # By name: the client's transport is httpx in some releases of openai and httpx2 in others.
            unreachable = type(cause).__name__ == "ConnectError"
            raise TransientError(f"{where}: connection failed: {cause}", unreachable=unreachable) from None
        except (openai.APIError, ValueError, TypeError) as error:
            # A body that is no JSON, or JSON of another shape.
            raise TransientError(f"{where}: the answer is not a completion: {_short(str(error))}") from None


def _read_reply(reply: Any, text_of: Callable[[Any], Any]) -> Answer:
    """Take text and token count out of a reply, distrusting its shape."""
    try:
        text = text_of(reply.choices[0])
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise TransientError(f"the server's answer is not a completion: {_short(str(reply))}")
    tokens = getattr(getattr(reply, "usage", None), "prompt_tokens", None)
    return Answer(text=text, prompt_tokens=tokens if isinstance(tokens, int) else None)


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _seconds(retry_after: str | None) -> float | None:
    """The delay form of Retry-After; its date form is left to the back-off."""
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None


class LocalCodeLlava:
    """A Code-LLaVA checkpoint in this process: contexts as latents, or as text for its bare decoder."""

    concurrency = 1

    def __init__(self, settings: BackendSettings) -> None:
        from utils.inference.checkpoint import find_checkpoint
        from utils.inference.inference import load_model

        self.batch_size = settings.batch_size
        self._settings = settings
        self._sampling = settings.sampling
        self._compress = settings.name == "local-memory"
        files = find_checkpoint(settings.model, settings.chunk_size)
        self.details: dict[str, Any] = {"model": files.root.name, "fingerprint": files.fingerprint}
        self._model, self._tokenizer, self._processor = load_model(files.root, settings.device, settings.chunk_size)
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
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.batch_size = settings.batch_size
        self._settings = settings
        self._sampling = settings.sampling
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
            self._model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto").to(device).eval()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{settings.model}: cannot be loaded as a causal language model: {error}") from None
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
