"""What passes between the runner and whoever answers: questions, answers, settings, errors, and the `Backend` protocol.

Knows no model and no network; `ruler/answering/backends.py` holds the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from utils.client.completion import Sampling
from utils.errors import ServerError
from utils.model.markers import MARKERS, wrap

if TYPE_CHECKING:
    from utils.compress.arms import Arm
    from utils.compress.select import Expansion

DEFAULT_SERVER_URL = "http://127.0.0.1:8000"
BACKENDS = ("server-text", "local-text", "server-memory", "local-memory")


class TransientError(ServerError):
    """Not answered in all tries: overload, a lost connection, a time-out, an answer that is no completion."""


class RowRefusedError(ServerError):
    """This row cannot be answered, the others may: too long a prompt, a request the server rejects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row as a backend needs it; the offsets say which part of `input` may be compressed."""

    input: str
    answer_prefix: str
    context_start: int
    context_end: int
    max_tokens: int

    @property
    def text(self) -> str:
        """The whole prompt; the model continues it."""
        return self.input + self.answer_prefix

    @property
    def memory_text(self) -> str:
        """The same prompt with its context between the memory markers.

        Raises:
            RowRefusedError: The context is empty, or there is marker text outside of it.
        """
        if found := [marker for marker in MARKERS if marker in self.with_context("")]:
            raise RowRefusedError(f"the prompt holds the text {found[0]}, which only a memory may")
        return self.with_context(wrap(self.context))

    @property
    def context(self) -> str:
        """What may be compressed.

        Raises:
            RowRefusedError: It is empty.
        """
        context = self.input[self.context_start : self.context_end]
        if not context:
            raise RowRefusedError(
                f"the row's context is empty (context_start {self.context_start}, context_end {self.context_end}): "
                "prepare the dataset again"
            )
        return context

    def with_context(self, shown: str) -> str:
        """The whole prompt with another text in its context's place."""
        return self.input[: self.context_start] + shown + self.input[self.context_end :] + self.answer_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back.

    Attributes:
        text: The new text only.
        prompt_tokens: Rows the decoder read; None where a server does not say.
        memory_tokens: Encoder tokens that were compressed, or shortened; None for the full text.
        num_latents: Latents that stand for them; None for the full text.
        text_rows: Rows of them that are text; None where nothing of a memory was asked to stay text.
    """

    text: str
    prompt_tokens: int | None = None
    memory_tokens: int | None = None
    num_latents: int | None = None
    text_rows: int | None = None

    def counts(self) -> dict[str, int]:
        """The known counts, for the prediction row."""
        return {k: v for k, v in asdict(self).items() if k != "text" and v is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """Everything that chooses and shapes a backend; what changes an answer is kept in the run's manifest.

    Attributes:
        name: One of `BACKENDS`.
        model: Served model name, or a model or checkpoint folder; None takes the server's only model, or the embedded
            default checkpoint.
        chunk_size: Encoder tokens a latent, for the memory backends; None takes the checkpoint's own.
        expansion: What of a context stays text, for the memory backends; None: nothing.
        arm: How the context is shown, of an evaluation; `name` and `chunk_size` must suit it, and it takes
            the place of `expansion`. None: as the backend's name says.
        checkpoint: The encoder's checkpoint for `server-memory`.
        server_url: Base URL of a server, with or without `/v1`.
        api_key: Key for it; None looks into VLLM_API_KEY and OPENAI_API_KEY.
        api: `completions` continues the prompt; `chat` makes it a user turn in the model's chat template.
        system_prompt: What a chat begins with; nothing by default.
        concurrency: Requests in flight (servers).
        batch_size: Rows a forward pass (local models).
        timeout_s: Of one request.
        device: `auto`, `cpu`, `cuda:0`… for local models.
        cache: Keep latents in the latent cache and take them from there; they are the same either way.
        cache_dir: Where that is; None for the default place.
    """

    name: str = "local-memory"
    model: str | None = None
    chunk_size: int | None = None
    expansion: Expansion | None = None
    arm: Arm | None = None
    checkpoint: str | None = None
    server_url: str = DEFAULT_SERVER_URL
    api_key: str | None = field(default=None, repr=False)
    api: str = "completions"
    system_prompt: str = ""
    concurrency: int = 8
    batch_size: int = 1
    timeout_s: float = 600.0
    device: str = "auto"
    cache: bool = True
    cache_dir: str | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The chat around a prompt."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": prompt}]

    def identity(self) -> dict[str, Any]:
        """What an answer depends on; two runs with another identity must not share a folder."""
        # Runs without them are called what they were called before there were any.
        asked: dict[str, Any] = {"expansion": self.expansion.to_json()} if self.expansion else {}
        if self.arm:
            asked["arm"] = self.arm.name
        return asked | {
            "backend": self.name,
            "model": self.model,
            "checkpoint": self.checkpoint,
            "chunk_size": self.chunk_size,
            "api": self.api,
            "system_prompt": self.system_prompt,
            **{name: getattr(self.sampling, name) for name in ("temperature", "top_p", "top_k", "seed")},
            "stop": list(self.sampling.stop),
        }


class Backend(Protocol):
    """Answers questions.

    Attributes:
        batch_size: Questions a call takes at most.
        concurrency: Calls that may run at once.
        details: What the backend found out when it started (model, chunk size…), for the manifest.
    """

    batch_size: int
    concurrency: int
    details: dict[str, Any]

    async def start(self) -> None:
        """Find out what is there and fill `details`.

        Raises:
            ServerError: Nothing listens at the server's address.
        """
        ...

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer a batch, in order."""
        ...

    async def close(self) -> None:
        """Let go of connections and memory."""
        ...
