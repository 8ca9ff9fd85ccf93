"""What a request asks of the local decoder: the fields that it honours, each checked; any other is refused by name.

Honoured: `model`, `messages` or `prompt`, `max_tokens` (also `max_completion_tokens`), `temperature`, `top_p`, `top_k`,
`min_p`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`, `n`, `logprobs`, `top_logprobs`, `seed`, `stop`
(within bounds), `stream`, `stream_options.include_usage`. Ignored are labels for accounts elsewhere (`user`,
`metadata`, …). Fields that hold what is the case anyway, as OpenAI's and vLLM's defaults do (`best_of: 1`, `tools: []`,
null, …), are let through.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.client.completion import Sampling
from utils.serving.api_error import ApiError, shown

# The API's own default for completions; a chat may go on to the end of the positions.
_COMPLETION_TOKENS = 16
# Each new token is looked through for each of them.
MAX_STOPS, MAX_STOP_CHARACTERS = 32, 1024
_MOST_NAMED = 10
# As many as OpenAI and vLLM take.
MAX_CHOICES, MAX_LIKELIEST = 128, 20
# Choices are drawn together: their rows are bounded as those of a request's prompts are.
_POSITIONS_TOGETHER = 4
_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stream",
    "stream_options", "frequency_penalty", "presence_penalty", "n", "logprobs",
}  # fmt: skip
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
_COMPLETION = _COMMON | {"prompt"}
# Labels: of end users, accounts and caches that are not here.
_IGNORED = {"user", "cache_salt", "metadata", "prompt_cache_key", "request_id", "safety_identifier"}
# Field → values that ask for nothing; null never does.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "length_penalty": (1,), "top_logprobs": (0,), "logit_bias": ({},), "echo": (False,),
    "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "service_tier": ("auto", "default"), "store": (False,), "verbosity": ("medium",), "priority": (0,),
    "use_beam_search": (False,), "ignore_eos": (False,), "min_tokens": (0,), "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "chat_template_kwargs": ({},),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRequest:
    """How one request is to be answered.

    Attributes:
        chat: Whether it is a chat or a completion.
        sampling: How to draw.
        n: How many choices.
        logprobs: Tokens come with their log-probabilities, and so many of the likeliest ones'; None: without.
        stream: Whether the answer is streamed.
        include_usage: Whether the stream ends with the usage.
    """

    chat: bool
    sampling: Sampling
    n: int
    logprobs: int | None
    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, body: Mapping[str, Any], chat: bool, model: str) -> LocalRequest:
        """Check a body.

        Args:
            body: The JSON object; its prompt is not looked at.
            chat: Whether it is a chat or a completion.
            model: The one model that is served.

        Raises:
            ApiError: 404, another model; 400, a field with an impossible value, or one that is not honoured.
        """
        given = {name: value for name, value in body.items() if value is not None}
        others = given.keys() - (_CHAT if chat else _COMPLETION) - _IGNORED
        if refused := sorted(name for name in others if not _asks_nothing(name, given[name])):
            names = ", ".join(shown(name) for name in refused[:_MOST_NAMED])
            more = f" and {len(refused) - _MOST_NAMED} more" if len(refused) > _MOST_NAMED else ""
            raise ApiError(400, f"the local backend has no {names}{more}: leave it out, or use a vLLM backend")
        if given.get("model", model) != model:
            raise ApiError(404, f"the model {shown(given['model'])} does not exist: this server has {model!r}")
        default = None if chat else _COMPLETION_TOKENS
        limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
        options = given.get("stream_options", {})
        return cls(
            chat=chat,
            sampling=Sampling(
                max_tokens=_whole(given, limit, default, at_least=1),
                temperature=_number(given, "temperature", 1.0, 0.0, 100.0),
                top_p=_number(given, "top_p", 1.0, 1e-6, 1.0),
                # -1 is vLLM's word for all.
                top_k=max(0, _whole(given, "top_k", 0, at_least=-1) or 0),
                min_p=_number(given, "min_p", 0.0, 0.0, 1.0),
                # Without the field what the decoder's settings say.
                repetition_penalty=_number(given, "repetition_penalty", 1.0, 1e-2, 100.0)
                if "repetition_penalty" in given
                else None,
                frequency_penalty=_number(given, "frequency_penalty", 0.0, -2.0, 2.0),
                presence_penalty=_number(given, "presence_penalty", 0.0, -2.0, 2.0),
                seed=_whole(given, "seed", secrets.randbits(63), at_least=-(1 << 63)),
                stop=_texts(given.get("stop", [])),
            ),
            n=_whole(given, "n", 1, at_least=1, at_most=MAX_CHOICES) or 1,
            logprobs=_chat_logprobs(given) if chat else _completion_logprobs(given),
            stream=given.get("stream", False) is True,
            include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        )

    def check_together(self, num_rows: int, max_rows: int | None) -> None:
        """Refuse choices that are too long together.

        Args:
            num_rows: Rows of the prompt.
            max_rows: The decoder's positions; None where nobody says.

        Raises:
            ApiError: 413.
        """
        if self.n == 1 or max_rows is None:
            return
        longest = num_rows + self.sampling.max_tokens if self.sampling.max_tokens else max_rows
        if self.n * longest > _POSITIONS_TOGETHER * max_rows:
            raise ApiError(
                413, f"{self.n} choices of up to {longest} rows are {self.n * longest} rows together, the limit is "
                f"{_POSITIONS_TOGETHER * max_rows}: lower n or max_tokens",
            )  # fmt: skip


def _chat_logprobs(given: Mapping[str, Any]) -> int | None:
    wanted = given.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise ApiError(400, f"logprobs is {shown(wanted)}, expected true or false")
    likeliest = _whole(given, "top_logprobs", 0, at_least=0, at_most=MAX_LIKELIEST)
    if likeliest and not wanted:
        raise ApiError(400, f"top_logprobs is {likeliest}, expected logprobs true beside it")
    return likeliest if wanted else None


def _completion_logprobs(given: Mapping[str, Any]) -> int | None:
    if given.get("logprobs", False) is False:
        return None
    return _whole(given, "logprobs", None, at_least=0, at_most=MAX_LIKELIEST)


def _asks_nothing(name: str, value: Any) -> bool:
    # Python takes true for 1.
    neutral = (known for known in _WITHOUT_EFFECT.get(name, ()) if isinstance(known, bool) == isinstance(value, bool))
    return any(value == known for known in neutral)


def _number(given: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(400, f"{name} is {shown(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def _whole(
    given: Mapping[str, Any], name: str, default: int | None, at_least: int, at_most: int = (1 << 63) - 1
) -> int | None:
    value = given.get(name, default)
    if value is None or (type(value) is int and at_least <= value <= at_most):
        return value
    most = "" if at_most >> 62 else f" and at most {at_most}"
    raise ApiError(400, f"{name} is {shown(value)}, expected a whole number of at least {at_least}{most}")


def _texts(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(400, f"stop is {shown(stop)}, expected a text or a list of texts, none of them empty")
    if len(texts) > MAX_STOPS or max(map(len, texts), default=0) > MAX_STOP_CHARACTERS:
        raise ApiError(
            400, f"stop has {len(texts)} texts of up to {max(map(len, texts))} characters, the limits are {MAX_STOPS} "
            f"and {MAX_STOP_CHARACTERS}",
        )  # fmt: skip
    return tuple(texts)
