"""How an answer is drawn, how often a server is asked for it, and what came back. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Below it the largest logit is drawn anyway, and others may pass what a float can hold; vLLM's bound, too.
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn; greedy by default.

    Attributes:
        max_tokens: Most new tokens; None: to the end of the decoder's positions.
        temperature: 0 is greedy.
        top_p: Probability mass that is drawn from; 1 for all of it.
        top_k: Most likely tokens that are drawn from; 0 for all.
        min_p: Least probability, as a share of the likeliest token's.
        repetition_penalty: Of tokens that the answer already has; None: what the decoder's settings say.
        frequency_penalty: Taken from a token's logit for each time that the answer already has it.
        presence_penalty: Taken once from the logits of tokens that the answer already has.
        seed: Of the drawing; None: a server takes another one each time, a decoder here goes on drawing.
        stop: Strings that end the answer and do not belong to it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: each answer to a prompt is the same."""
        return self.temperature < _LEAST_TEMPERATURE

    def request_fields(self) -> dict[str, Any]:
        """The fields of an OpenAI-compatible request; what is not OpenAI's own is left out where it says nothing."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": list(self.stop) or None,
            "top_k": self.top_k or None,
            "min_p": self.min_p or None,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty or None,
            "presence_penalty": self.presence_penalty or None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a server is asked, and how long it is left alone in between.

    Attributes:
        attempts: Tries in all.
        first_wait_s: Longest wait before the second try; it doubles from try to try, and a random part of it is waited.
        longest_wait_s: Upper limit of one wait; a server's Retry-After is obeyed up to it.
        unanswered: Ask again also after time-outs and answers that are no completion.
    """

    attempts: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    unanswered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was said to one prompt; None is what a server did not tell.

    Attributes:
        text: The new text, without special tokens.
        finish_reason: "stop" at an end token or a stop string, "length" at the limit; servers have further ones.
        prompt_tokens: Rows of the prompt.
        completion_tokens: New tokens, an end token included.
        cached_tokens: Prompt rows from a server's prefix cache.
        first_text_s: Seconds until the first text; None without streaming.
        total_s: Seconds until the end.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None = None
    first_text_s: float | None = None
    total_s: float | None = None
