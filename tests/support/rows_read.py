"""What a vLLM server makes of a request's body: the rows that its model reads."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.fake_server import rows_of
from utils.compress.compressor import Compressor
from utils.model.chat import chat_text
from utils.model.markers import MEMORY
from utils.model.prompt import MemoryPrompt


def rows_read(body: dict[str, Any], compressor: Compressor) -> torch.Tensor:
    """The rows [T, D] of a completion, or of a chat: its parts in the chat template, latents in their places."""
    if "prompt_embeds" in body:
        return rows_of(body["prompt_embeds"])
    latents: list[torch.Tensor] = []

    def as_text(content: Any) -> str:
        if isinstance(content, str):
            return content
        if isinstance(content, list):
            return "".join(as_text(part.get("text", part)) for part in content)
        latents.append(rows_of(content["data"]))
        return MEMORY * len(latents[-1])

    messages = [{**message, "content": as_text(message["content"])} for message in body["messages"]]
    decoder = compressor.processor.tokenizers.decoder
    ids = decoder(chat_text(messages, decoder), add_special_tokens=False)["input_ids"]
    rows = compressor.embed(MemoryPrompt(input_ids=ids, spans=()), []).values_TD
    is_latent = torch.tensor(ids) == decoder.convert_tokens_to_ids(MEMORY)
    if latents:
        rows[is_latent] = torch.cat(latents)
    return rows
