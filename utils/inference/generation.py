"""Answers from a decoder in this process: loading, batches, sampling, stop strings, streaming; the one generate loop.

    generator = Generator(decoder, tokenizer)
    completions = generator.complete(rows, Sampling(max_tokens=64))         # rows: one [T, D] tensor a prompt

Stop strings are looked for in the text, not with transformers' `StopStringCriteria`, which first compares each string
with each token of the vocabulary: 0.9 s for one string, 42 s for 32 of 32 characters, with 49k tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint.locate import find_checkpoint
from utils.checkpoint.pair import end_tokens, framing_tokens, load_pair
from utils.checkpoint.settings import EncoderSettings
from utils.client.completion import Completion, Sampling
from utils.compress.latent_cache import LatentCache
from utils.compress.span_encoder import SpanEncoder
from utils.errors import PromptError
from utils.inference.answer_watch import AnswerPiece, AnswerWatch
from utils.inference.text_pieces import TextPieces, decode_answer
from utils.inference.token_scores import TokenScores
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.generate import continue_rows
from utils.model.limits import check_prompt_fits
from utils.model.processor import Processor
from utils.model.prompt import MemoryLimit


def open_pair(
    checkpoint: str | Path | None,
    chunk_size: int | None,
    settings: EncoderSettings,
    cache: LatentCache | None,
    limit: MemoryLimit,
) -> tuple[CodeLLaVAModel, Processor]:
    """What `utils.inference.inference.load_model` loads."""
    files = find_checkpoint(checkpoint, chunk_size)
    model, tokenizers = load_pair(files, settings)
    if cache is not None:
        model.cached_encoder = SpanEncoder(model.memory_encoder, files.fingerprint, cache)
    processor = Processor(tokenizers=tokenizers, chunk_size=files.config.chunk_size, limit=limit)
    return model, processor


class Generator:
    """A decoder that continues prompts.

    Args:
        decoder: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, decoder: Any, tokenizer: Any) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.end_ids = end_tokens(decoder, tokenizer)
        self.hidden_ids = framing_tokens(decoder, tokenizer)

    @property
    def max_rows(self) -> int | None:
        """Positions of the decoder: the longest prompt with its answer."""
        return getattr(self.decoder.config, "max_position_embeddings", None)

    def check_room(self, num_rows: int, sampling: Sampling, name: str = "the prompt") -> None:
        """Raise `PromptError` if prompt and answer are longer than the decoder's positions."""
        check_prompt_fits(num_rows, self.decoder.config, sampling.max_tokens or 1, name)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Rows [T, D] of token ids.

        Raises:
            PromptError: There are none, or one that the decoder does not have.
        """
        table = self.decoder.get_input_embeddings()
        num_ids = table.weight.shape[0]
        if not ids or max(ids) >= num_ids:
            what = f"token id {max(ids)}, the decoder's ids end at {num_ids - 1}" if ids else "no tokens"
            raise PromptError(f"the prompt has {what}")
        return table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))

    def complete(
        self,
        rows: Sequence[torch.Tensor],
        sampling: Sampling,
        *,
        on_piece: Callable[[AnswerPiece], None] | None = None,
        cancelled: threading.Event | None = None,
        logprobs: int | None = None,
        **arguments: Any,
    ) -> list[Completion]:
        """Continue prompts as one batch.

        Args:
            rows: One [T, D] tensor a prompt.
            sampling: How; its `max_tokens` may be None for a single prompt alone.
            on_piece: Called with each piece of an answer as it comes to be.
            cancelled: Ends the work at the next token.
            logprobs: Pieces tell of each token its log-probability, and so many of the likeliest in its place.
            arguments: Further ones of Hugging Face's `generate`.

        Raises:
            PromptError: A prompt and its answer are longer than the decoder's positions.
            ConfigError: There is not memory enough.
        """
        if not rows:
            return []
        for number, row in enumerate(rows):
            self.check_room(len(row), sampling, f"prompt {number}" if len(rows) > 1 else "the prompt")
        max_tokens = sampling.max_tokens or (self.max_rows or 1 << 20) - max(map(len, rows))
        pieces = [TextPieces(self.tokenizer, self.hidden_ids, sampling.stop) for _ in rows]
        scores = None if logprobs is None else TokenScores(self.tokenizer, logprobs, self.hidden_ids)
        watch = AnswerWatch(pieces, self.end_ids, on_piece, cancelled, scores)
        if not sampling.is_greedy:
            arguments |= {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        if sampling.stop or on_piece or cancelled:
            arguments |= {"streamer": watch, "stopping_criteria": [watch.has_ended]}
        generated = continue_rows(
            self.decoder,
            rows,
            max_new_tokens=max_tokens,
            end_ids=self.end_ids,
            pad_id=self.tokenizer.pad_token_id or 0,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            before_penalties=[scores] if scores else (),
            **arguments,
        )
        return [self._completion(*one) for one in zip(rows, generated, pieces, strict=True)]

    def _completion(self, row: torch.Tensor, ids: list[int], pieces: TextPieces) -> Completion:
        ended = pieces.stopped or (bool(ids) and ids[-1] in self.end_ids)
        count = pieces.num_tokens if pieces.stopped else len(ids)
        return Completion(
            text=pieces.text if pieces.num_tokens else decode_answer(self.tokenizer, ids, self.hidden_ids),
            finish_reason="stop" if ended else "length",
            prompt_tokens=len(row),
            completion_tokens=count,
        )


def batches_by_length(lengths: Sequence[int], batch_size: int, window: int = 8) -> list[list[int]]:
    """Indices of prompts in batches of similar lengths, so that little padding is prefilled.

    Args:
        lengths: Rows of the prompts, in their own order.
        batch_size: Prompts of a batch.
        window: Batches among which prompts change places: no result waits for longer than that.
    """
    batches = []
    for begin in range(0, len(lengths), window * batch_size):
        here = range(begin, min(begin + window * batch_size, len(lengths)))
        order = sorted(here, key=lambda index: lengths[index])
        batches += [sorted(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    return batches
