"""The published functions of the Code-LLaVA workspace, over this project's parser and model.

    input_ids, codes, code_positions = parse_prompt(messages, tokenizer, embed_tokenizer, chunk_size)
    embeds_TD = compress(input_ids, codes, code_positions, model)

New code is better served by `utils.compress.compressor.Compressor`. Shape legend: T prompt rows, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from utils.errors import PromptError, SpliceError
from utils.model import prompt as prompts
from utils.model.limits import check_prompt_fits
from utils.model.splice import splice_latents

ParsedPrompt = tuple[list[int], list[str], list[tuple[int, int]]]


def parse_prompt(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, embed_tokenizer: Any, chunk_size: int
) -> ParsedPrompt:
    """Parse a chat with the decoder's template.

    Args:
        messages: `{"role": …, "content": …}` in order.
        tokenizer: The decoder's tokenizer, with the marker tokens.
        embed_tokenizer: The encoder's tokenizer.
        chunk_size: Encoder tokens per latent.

    Returns:
        Decoder ids with placeholders, the text of each span, and its half-open place in the ids, markers excluded.

    Raises:
        PromptError: See `utils.model.prompt.parse_chat_prompt`.
    """
    tokenizers = prompts.PromptTokenizers(decoder=tokenizer, encoder=embed_tokenizer)
    return _published_form(prompts.parse_chat_prompt(messages, tokenizers, chunk_size))


def parse_raw_prompt(text: str, tokenizer: Any, embed_tokenizer: Any, chunk_size: int) -> ParsedPrompt:
    """Parse one text without a template; the arguments and results of `parse_prompt`."""
    tokenizers = prompts.PromptTokenizers(decoder=tokenizer, encoder=embed_tokenizer)
    return _published_form(prompts.parse_raw_prompt(text, tokenizers, chunk_size))


def compress(
    input_ids: Sequence[int], codes: Sequence[str], code_positions: Sequence[tuple[int, int]], model: Any
) -> torch.Tensor:
    """Encode the spans and splice them into the prompt's embeddings.

    Args:
        input_ids: Decoder ids with placeholders.
        codes: The text of each span.
        code_positions: Its half-open place in `input_ids`.
        model: A `CodeLLaVAModel` from `load_model`.

    Returns:
        Prompt embeddings [T, D] in the decoder's dtype, on its device.

    Raises:
        PromptError: A text without tokens, or a prompt longer than the decoder's positions.
        SpliceError: Texts and places do not agree with each other or with the model's chunk size.
    """
    check_prompt_fits(len(input_ids), model.llm_model.config)
    if len(codes) != len(code_positions):
        raise SpliceError(f"{len(codes)} codes but {len(code_positions)} code positions: give one place a code")
    tokenizer = model.code_chunker.tokenizer
    token_ids = tokenizer(list(codes), add_special_tokens=False)["input_ids"] if codes else []
    for number, ids in enumerate(token_ids):
        if not ids:
            raise PromptError(f"code {number} has no encoder tokens; fill it or remove it")
    spans = [
        prompts.MemorySpan(text=text, token_ids=ids, start=start, stop=stop, chunk_size=model.config.chunk_size)
        for text, ids, (start, stop) in zip(codes, token_ids, code_positions, strict=True)
    ]
    with torch.inference_mode():
        embeds_TD = model.llm_model.get_input_embeddings()(torch.tensor(list(input_ids), device=model.device))
        return splice_latents(embeds_TD, model.encode_memory(spans), list(code_positions))


def _published_form(prompt: prompts.MemoryPrompt) -> ParsedPrompt:
    return (
        prompt.input_ids,
        [span.text for span in prompt.spans],
        [(span.start, span.stop) for span in prompt.spans],
    )
