"""The checkpoint's decoder in this process, through Hugging Face: prompt rows in, pieces of text out.

    decoder = LocalDecoder.load(files)
    rows_TD = decoder.chat_rows(messages)              # text, or content parts with latents as a server takes them
    answer = decoder.answer(rows_TD, Sampling(max_tokens=64, temperature=0), on_text=print)

Shape legend: T prompt rows, D decoder width.
"""

from __future__ import annotations

import secrets
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from utils.checkpoint.layout import CheckpointFiles
from utils.checkpoint.load import load_decoder, load_tokenizers
from utils.checkpoint.pair import end_tokens
from utils.checkpoint.settings import AUTOMATIC, EncoderSettings
from utils.compress.prompt_embeds import decode_wire
from utils.errors import PromptError
from utils.model.code_llava_model import check_prompt_fits, explain_out_of_memory
from utils.model.markers import MarkerIds
from utils.model.prompt import chat_text
from utils.model.splice import splice_latents
from utils.serving.api_error import ApiError
from utils.serving.bounded_tokenizer import BoundedTokenizer
from utils.serving.chat_parts import flat_chat
from utils.serving.text_pieces import TextPieces

# Below it the largest logit is drawn anyway, and others may pass what a float can hold; vLLM's bound, too.
_LEAST_TEMPERATURE = 1e-5
# A decoder that does not say how many positions it has.
_NO_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn; the defaults are the API's.

    Attributes:
        max_tokens: Most new tokens; None: to the end of the decoder's positions.
        temperature: 0 is greedy.
        top_p: Probability mass that is drawn from.
        seed: Of the drawing; None: another one each time.
        stop: Strings that end the answer and do not belong to it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was generated.

    Attributes:
        token_ids: New ids, without the end token.
        completion_tokens: New tokens, the end token included, as servers count them.
        finish_reason: "stop" at an end token or stop string, "length" at the limit.
    """

    token_ids: list[int]
    completion_tokens: int
    finish_reason: str


class LocalDecoder:
    """One decoder; its caller lets one thread at a time in.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer with the markers; used by no one else.
        name: What requests call the model.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._bounded = BoundedTokenizer(tokenizer)
        self._memory_id = MarkerIds.from_tokenizer(tokenizer).memory
        self._end_ids = end_tokens(model, tokenizer)

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
        return getattr(self._model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def chat_rows(self, messages: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Rows [T, D] of a chat whose content parts are texts and latents; parts are joined with nothing between.

        Raises:
            PromptError: Parts of another kind, or messages that the chat template refuses.
            ApiError: 413, more ids than positions.
        """
        flat, blobs = flat_chat(messages)
        latents = [decode_wire(blob) for blob in blobs]
        ids = self._ids(chat_text(flat, self._tokenizer))
        places = [index for index, token in enumerate(ids) if token == self._memory_id]
        if len(places) != len(latents):
            raise PromptError(f"{len(latents)} latent parts, but the chat template wrote {len(places)} of them")
        widened: list[int] = []
        spans: list[tuple[int, int]] = []
        copied = 0
        for place, rows in zip(places, latents, strict=True):
            widened += ids[copied:place]
            spans.append((len(widened), len(widened) + len(rows)))
            widened += [self._memory_id] * len(rows)
            copied = place + 1
        return splice_latents(self._embed(widened + ids[copied:]), latents, spans)

    @torch.inference_mode()
    def text_rows(self, prompt: str | Sequence[int]) -> torch.Tensor:
        """Rows [T, D] of a text, or of token ids.

        Raises:
            PromptError: An id that the decoder does not have.
            ApiError: 413, more ids than positions.
        """
        ids = self._ids(prompt, special_tokens=True) if isinstance(prompt, str) else prompt
        self._check_count(len(ids))
        num_rows = self._model.get_input_embeddings().weight.shape[0]
        if not ids or max(ids) >= num_rows:
            raise PromptError(
                f"the prompt has token id {max(ids)}, the decoder's ids end at {num_rows - 1}"
                if ids
                else "the prompt has no tokens"
            )
        return self._embed(ids)

    def wire_rows(self, blob: str) -> torch.Tensor:
        """Rows [T, D] of a whole prompt that the gateway compressed."""
        return decode_wire(blob).to(device=self._model.device, dtype=self._model.dtype)

    def check_room(self, num_rows: int, sampling: Sampling) -> None:
        """Raise `PromptError` if prompt and answer are longer than the decoder's positions."""
        check_prompt_fits(num_rows, self._model.config, sampling.max_tokens or 1)

    @torch.inference_mode()
    def answer(
        self,
        rows_TD: torch.Tensor,
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda text: None,
        cancelled: threading.Event | None = None,
    ) -> Answer:
        """Continue a prompt.

        Args:
            rows_TD: From one of the `…_rows` methods.
            sampling: How.
            on_text: Called with each piece of text; together they are the answer's text.
            cancelled: Ends the work at the next token.

        Raises:
            PromptError: Prompt and answer are longer than the decoder's positions.
        """
        self.check_room(len(rows_TD), sampling)
        max_tokens = sampling.max_tokens or self._max_rows - len(rows_TD)
        watch = _Watch(TextPieces(self._tokenizer, sampling.stop), self._end_ids, on_text, cancelled)
        drawing: dict[str, Any] = {"do_sample": False}
        if sampling.temperature >= _LEAST_TEMPERATURE:
            drawing = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        with (
            explain_out_of_memory(f"answering {len(rows_TD)} rows", "lower --max-memory-tokens"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*repetition_penalty.*inputs_embeds")
            self._model.generate(
                inputs_embeds=rows_TD[None],
                attention_mask=torch.ones(1, len(rows_TD), dtype=torch.long, device=rows_TD.device),
                max_new_tokens=max_tokens,
                eos_token_id=self._end_ids or None,
                pad_token_id=self._tokenizer.pad_token_id or 0,
                streamer=watch,
                stopping_criteria=[watch.has_ended],
                **drawing,
            )
        return watch.answer()

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

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        return self._model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=self._model.device))


class _Watch(BaseStreamer):
    """Sees each token as it is drawn: passes text on, and says when to stop."""

    def __init__(
        self,
        pieces: TextPieces,
        end_ids: Sequence[int],
        on_text: Callable[[str], None],
        cancelled: threading.Event | None,
    ) -> None:
        self._pieces = pieces
        self._end_ids = end_ids
        self._on_text = on_text
        self._cancelled = cancelled or threading.Event()
        self._ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take new ids; the first call brings the prompt's, of which there are none beside rows."""
        for token in value.flatten().tolist():
            self._ids.append(token)
            if token not in self._end_ids:
                self._tell(self._pieces.add(token))

    def end(self) -> None:
        """Pass on what was held back."""
        self._tell(self._pieces.finish())

    def has_ended(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """The stopping criterion for a stop string and for a client that has gone."""
        ended = self._pieces.stopped or self._cancelled.is_set()
        return torch.full((len(ids),), ended, dtype=torch.bool, device=ids.device)

    def answer(self) -> Answer:
        """The outcome."""
        ended = bool(self._ids) and self._ids[-1] in self._end_ids
        return Answer(
            token_ids=self._ids[:-1] if ended else self._ids,
            completion_tokens=len(self._ids),
            finish_reason="stop" if ended or self._pieces.stopped else "length",
        )

    def _tell(self, text: str) -> None:
        if text:
            self._on_text(text)
