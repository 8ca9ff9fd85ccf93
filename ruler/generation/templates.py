"""Chat templates around a task's prompt: the reference's named ones and the one a tokenizer carries.

A chat template is the text before and behind the prompt; the answer prefix follows behind it, so that a chat model
continues its own turn.

    chat_template("meta-chat")       # ChatTemplate(name='meta-chat', before='[INST] ', behind=' [/INST]')
"""

from __future__ import annotations

from dataclasses import dataclass

from ruler.generation.tokenizers import read_chat_template
from utils.errors import ConfigError

OWN = "tokenizer"
_SLOT = "{task_template}"

# The formats of the models that RULER's authors measured, named as in their program.
NAMED: dict[str, str] = {
    "base": "{task_template}",
    "meta-chat": "[INST] {task_template} [/INST]",
    "vicuna-chat": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {task_template} ASSISTANT:"
    ),
    "lwm-chat": "You are a helpful assistant. USER: {task_template} ASSISTANT: ",
    "command-r-chat": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{task_template}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "chatglm-chat": "[gMASK]sop<|user|> \n {task_template}<|assistant|> \n ",
    "RWKV": (
        "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in full details. "
        "Please feel free to ask any question and I will always answer it\n\nUser: {task_template}\n\nAssistant:"
    ),
    "Phi3": "<|user|>\n{task_template}<|end|>\n<|assistant|>\n",
    "meta-llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{task_template}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "jamba": ("<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> {task_template}<|eom|><|bom|><|assistant|>"),
}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Text before and behind a prompt, up to the start of the answer; `name` is one of `NAMED`, or `tokenizer`."""

    name: str
    before: str = ""
    behind: str = ""


def chat_template(name: str, tokenizer_path: str = "") -> ChatTemplate:
    """A chat template by name.

    Args:
        name: One of `NAMED`, or `tokenizer` for the template that the tokenizer carries.
        tokenizer_path: The tokenizer's folder or hub id, for `tokenizer`.

    Raises:
        ConfigError: There is no such template, or the tokenizer carries none that keeps the prompt as it is.
    """
    if name in NAMED:
        before, _, behind = NAMED[name].partition(_SLOT)
        return ChatTemplate(name, before, behind)
    if name != OWN:
        raise ConfigError(f"unknown template {name!r}: expected one of {', '.join([*NAMED, OWN])}")
    return _render(read_chat_template(tokenizer_path), tokenizer_path)


def _render(source: str, tokenizer_path: str) -> ChatTemplate:
    """One user turn and the start of the answer, as transformers would render them."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    slot = "ruler-prompt-goes-here"
    try:
        text = environment.from_string(source).render(
            messages=[{"role": "user", "content": slot}],
            add_generation_prompt=True,
            # Special tokens such as bos stay out: the tokenizer or the server adds them when it encodes.
            bos_token="",
            eos_token="",
            raise_exception=refuse,
        )
    except TemplateError as error:
        raise ConfigError(f"the chat template of {tokenizer_path} cannot be rendered: {error}") from None
    before, found, behind = text.partition(slot)
    if not found or slot in behind:
        raise ConfigError(f"the chat template of {tokenizer_path} does not keep the prompt as it is")
    return ChatTemplate(OWN, before, behind)
