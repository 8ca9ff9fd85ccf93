"""The checkpoint's decoder in this process, through Hugging Face: prompt rows in, pieces of text out.

    decoder = LocalDecoder.load(files)
    rows_TD = decoder.chat_rows(messages)              # text, or content parts with latents as a server takes them
    answer = decoder.answer(rows_TD, Sampling(max_tokens=64, temperature=0), on_text=print)

Shape legend: T prompt rows, D decoder width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import load_decoder, load_tokenizers
from utils.checkpoint.settings import AUTOMATIC, EncoderSettings
from utils.client.completion import Completion, Sampling
from utils.compress.prompt_embeds import decode_wire
from utils.errors import PromptError
from utils.inference.generation import Generator
from utils.model.markers import MarkerIds
from utils.model.prompt import chat_text, widen
from utils.model.splice import splice_latents
from utils.serving.api_error import ApiError
from utils.serving.bounded_tokenizer import BoundedTokenizer
from utils.serving.chat_parts import flat_chat

# A decoder that does not say how many positions it has.
_NO_LIMIT = 1 << 20


class LocalDecoder:
    """One decoder; its caller lets one thread at a time in.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer with the markers; used by no one else.
        name: What requests call the model.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self._generator = Generator(model.eval(), tokenizer)
        self._bounded = BoundedTokenizer(tokenizer)
        self._memory_id = MarkerIds.from_tokenizer(tokenizer).memory

    @classmethod
    def load(cls, files: CheckpointFiles, settings: EncoderSettings = AUTOMATIC) -> LocalDecoder:
        """Load a checkpoint's decoder.

        Raises:
            CheckpointError: The decoder cannot be read.
        """
        return cls(load_decoder(files, settings), load_tokenizers(files).decoder, files.root.name)

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt with answer, in tokens."""
        return self._generator.max_rows

    @torch.inference_mode()
    def chat_rows(self, messages: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Rows [T, D] of a chat whose content parts are texts and latents; parts are joined with nothing between.

        Raises:
            PromptError: Parts of another kind, or messages that the chat template refuses.
            ApiError: 413, more ids than positions.
        """
        flat, blobs = flat_chat(messages)
        latents = [decode_wire(blob) for blob in blobs]
        ids = self._ids(chat_text(flat, self._generator.tokenizer))
        places = [index for index, token in enumerate(ids) if token == self._memory_id]
        if len(places) != len(latents):
            raise PromptError(f"{len(latents)} latent parts, but the chat template wrote {len(places)} of them")
        widened, begins = widen(ids, list(map(len, latents)), self._memory_id)
        spans = [(int(begins[at]), int(begins[at + 1])) for at in places]
        return splice_latents(self._generator.embed(widened.tolist()), latents, spans)

    @torch.inference_mode()
    def text_rows(self, prompt: str | Sequence[int]) -> torch.Tensor:
        """Rows [T, D] of a text, or of token ids.

        Raises:
            PromptError: An id that the decoder does not have.
            ApiError: 413, more ids than positions.
        """
        ids = self._ids(prompt, special_tokens=True) if isinstance(prompt, str) else prompt
        self._check_count(len(ids))
        return self._generator.embed(ids)

    def wire_rows(self, blob: str) -> torch.Tensor:
        """Rows [T, D] of a whole prompt that the gateway compressed."""
        return decode_wire(blob).to(device=self._generator.decoder.device, dtype=self._generator.decoder.dtype)

    def check_room(self, num_rows: int, sampling: Sampling) -> None:
        """Raise `PromptError` if prompt and answer are longer than the decoder's positions."""
        self._generator.check_room(num_rows, sampling)

    def answer(
        self,
        rows_TD: torch.Tensor,
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda text: None,
        cancelled: threading.Event | None = None,
    ) -> Completion:
        """Continue a prompt; see `Generator.complete`.

        Args:
            rows_TD: From one of the `…_rows` methods.
            sampling: How.
            on_text: Called with each piece of text; together they are the answer's text.
            cancelled: Ends the work at the next token.
        """
        return self._generator.complete([rows_TD], sampling, on_text=on_text, cancelled=cancelled)[0]

    def _ids(self, text: str, *, special_tokens: bool = False) -> list[int]:
        ids = self._bounded.ids(text, self._max_rows, special_tokens=special_tokens)
        if ids is None:
            raise ApiError(413, f"the prompt has more tokens than the decoder's {self._max_rows} positions: shorten it")
        return ids

    def _check_count(self, num_ids: int) -> None:
        if num_ids > self._max_rows:
            raise ApiError(413, f"the prompt has {num_ids} tokens, but the decoder has {self._max_rows} positions")

    @property
    def _max_rows(self) -> int:
        return self.max_model_len or _NO_LIMIT
