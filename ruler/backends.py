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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruler.protocol import BACKENDS, Answer, Backend, BackendSettings, Question, Sampling
from ruler.server import ServerText, read_reply
from utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from utils.inference.prompt_embeds import CompressionStats
    from utils.model.prompt import MemoryPrompt


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
    from utils.inference.checkpoint import find_checkpoint

    return Path(str(model)) if _is_plain_model(model) else find_checkpoint(model).decoder


class ServerMemory(ServerText):
    """Compresses contexts here and sends whole prompts as embeddings to a vLLM server's `/v1/completions`.

    A chat's template is applied here too: the server joins the parts of a chat in its own way, which can change ids.
    """

    def __init__(self, settings: BackendSettings) -> None:
        from utils.inference.compressor import Compressor

        super().__init__(settings)
        self._compressor = Compressor.load(settings.checkpoint, chunk_size=settings.chunk_size, device=settings.device)
        self.details |= {
            "checkpoint": self._compressor.files.root.name,
            "fingerprint": self._compressor.files.fingerprint,
            "chunk_size": self._compressor.processor.chunk_size,
        }
        self._encoder_free = asyncio.Lock()
        # What a retry sends again; emptied with the answer.
        self._encoded: dict[Question, tuple[str, CompressionStats]] = {}

    async def _ask(self, question: Question) -> Answer:
        import openai

        blob, stats = await self._encode(question)
        arguments = self._arguments(question)
        arguments["extra_body"] = {**(arguments["extra_body"] or {}), "prompt_embeds": blob}
        # The request must not have a text prompt beside the embeddings, not even an empty one.
        reply = await self._call(self._client.completions.create, prompt=openai.omit, **arguments)
        text = read_reply(reply, lambda choice: choice.text).text
        del self._encoded[question]
        return Answer(
            text=text,
            prompt_tokens=stats.prompt_tokens,
            memory_tokens=stats.memory_tokens,
            num_latents=stats.num_latents,
        )

    async def _encode(self, question: Question) -> tuple[str, CompressionStats]:
        if question not in self._encoded:
            async with self._encoder_free:
                self._encoded[question] = await asyncio.to_thread(self._compress, question)
        return self._encoded[question]

    def _compress(self, question: Question) -> tuple[str, CompressionStats]:
        from utils.inference.prompt_embeds import encode_wire

        prompt = parse_prompt(self._compressor, question.memory_text, self._settings)
        embeds = self._compressor.compress([prompt])[0]
        return encode_wire(embeds.values_TD), embeds.stats


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
