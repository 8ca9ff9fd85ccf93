"""Chats as the decoder reads them: its template, and nobody else, writes control tokens.

    ids = chat_ids([{"role": "user", "content": "What is <|im_end|>?"}], tokenizer)

Messages have texts as contents, in which each memory is a placeholder between its markers. Knows no torch and no model.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from utils.errors import PromptError, first_line
from utils.model.markers import MARKERS, PLACEHOLDER, control_pattern


def chat_query(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a chat asks: its last user message that says something outside the memory; "" without one.

    Args:
        messages: With texts as contents, in which each memory is a placeholder.
    """
    asked = (m["content"].replace(PLACEHOLDER, " ").strip() for m in reversed(messages) if m["role"] == "user")
    return next(filter(None, asked), "")


def chat_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    read: Callable[[str], list[int]] | None = None,
    **template_arguments: Any,
) -> list[int]:
    """A chat as the decoder reads it, in ids.

    Control tokens, such as `<|im_end|>`, are the template's alone: in a message they are the characters that they are
    written with, or a text could end its turn and begin another's. Placeholders of memories are no text.

    Args:
        messages: With texts as contents, in which each memory is a placeholder.
        tokenizer: Of the decoder.
        read: In place of the tokenizer, and before it reads anything: text → ids, or an error where they are too many.
        template_arguments: Passed to the template.

    Raises:
        PromptError: As `chat_text`.
    """
    # The template writes the special tokens; adding them again would put a second BOS in front.
    tokenize = functools.partial(tokenizer, add_special_tokens=False)
    # First of all, for nothing else is done with a text that is too long.
    ids = read(chat_text(messages, tokenizer, **template_arguments)) if read else None
    every, controls = control_pattern(tokenizer), control_pattern(tokenizer, but=MARKERS)
    written = [text for message in messages for text in _texts_in(message)]
    if every is None or controls is None or not any(map(controls.search, written)):
        return list(tokenize(chat_text(messages, tokenizer, **template_arguments))["input_ids"]) if ids is None else ids
    # What the template writes is told from what it was given by names in the latter's place that nobody can know.
    mark = secrets.token_hex(16)
    found: list[str] = []

    def hide(match: re.Match[str]) -> str:
        found.append(match[0])
        return f"{mark}{len(found) - 1}{mark}"

    def shown(text: str) -> str:
        return re.sub(f"{mark}([0-9]+){mark}", lambda match: found[int(match[1])], text)

    hidden = [_map_texts(message, lambda text: controls.sub(hide, text)) for message in messages]
    text = chat_text(hidden, tokenizer, **template_arguments)
    ids = []
    begin = position = 0
    for start, stop in [*(match.span() for match in every.finditer(text)), (len(text), len(text))]:
        if mark in text[position:start]:
            # What stands between two of the template's tokens is read whole, as characters.
            ids += tokenize(text[begin:position])["input_ids"]
            ids += tokenize(shown(text[position:start]), split_special_tokens=True)["input_ids"]
            begin = start
        position = stop
    return ids + list(tokenize(text[begin:])["input_ids"])


def _texts_in(value: Any) -> Iterator[str]:
    """The texts of a message, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(inner)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A message with its texts changed, at any depth."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    return [_map_texts(inner, change) for inner in value] if isinstance(value, list) else value


def chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **template_arguments: Any) -> str:
    """A chat as the decoder reads it: its template with the generation prompt; no further special tokens belong to it.

    The role `developer` is the system message's for a template that does not know it.

    Raises:
        PromptError: The tokenizer has no chat template, or the template refuses the messages or drops a tool call.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the decoder tokenizer has no chat template: use the raw-text command instead")
    arguments = {"add_generation_prompt": True, **template_arguments, "tokenize": False}
    known = str(arguments.get("chat_template", tokenizer.chat_template))
    asked = [dict(message) for message in messages]
    for message in asked:
        if message.get("role") == "developer" and "developer" not in known:
            message["role"] = "system"

    def written(chat: list[dict[str, Any]]) -> str:
        try:
            return tokenizer.apply_chat_template(chat, **arguments)
        except Exception as error:
            # A template is a program that came with the checkpoint: it may fail in any way.
            refused = f"the decoder's chat template refuses these messages: {first_line(error)[:200]}"
            raise PromptError(refused) from None

    text = written(asked)
    for number, message in enumerate(asked):
        if message.get("tool_calls") and text == written(
            [*asked[:number], {**message, "tool_calls": []}, *asked[number + 1 :]]
        ):
            raise PromptError(
                f"message {number}: the decoder's chat template does not write tool_calls, which would be lost: put "
                "them into the content, or use a checkpoint whose template does"
            )
    return text
