"""One pair on held-out examples, in several arms (`utils.compress.arms`).

    evaluator = Evaluator(model, processor)
    records = evaluator.run(examples, find_arms("full,memory", [8]))

A record is one example in one arm, a JSON object. Greedy decoding throughout. `encode_ms` is what the encoder took,
`read_ms` what reading the prompt and writing the answer took: those of a batch, shared out among its examples. Arms
with latents of one chunk size share them; each is told what they cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.compress.arm_prompts import ArmPrompts
from utils.compress.arms import Arm
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.limits import free_device_bytes
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt, MemorySpan
from utils.training.data.examples import Example
from utils.training.evaluate.scores import contains, edit_similarity, is_exact
from utils.training.flops import TransformerCost

# The end token, and room for an answer that says more than was asked.
_SPARE_TOKENS = 17
_CPU_PROMPTS, _CPU_ROWS, _MOST_CUDA_PROMPTS = 8, 2048, 128


@dataclass(frozen=True, slots=True)
class Asked:
    """An example in an arm: its number among all, its prompt, and the most new tokens of its answer."""

    number: int
    example: Example
    prompt: MemoryPrompt
    num_tokens: int


@dataclass
class Evaluator:
    """A pair that answers.

    Attributes:
        model: In eval mode. Its encoder is timed: nothing comes from a latent cache.
        processor: Parses prompts for it.
        batch_size: Prompts generated together; None: by device, on a GPU as many as there is memory for.
    """

    model: CodeLLaVAModel
    processor: Processor
    batch_size: int | None = None
    # Of the arms at one chunk size: text and chunk size → latents [N, D], and the milliseconds they took.
    _latents: dict[tuple[str, int], tuple[torch.Tensor, float]] = field(default_factory=dict, init=False)
    _encode_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._prompts = ArmPrompts(self.processor)
        self._room = getattr(self.model.decoder.config, "max_position_embeddings", None)

    def run(
        self, examples: Sequence[Example], arms: Sequence[Arm], done: Collection[tuple[str, int]] = ()
    ) -> Iterator[dict[str, Any]]:
        """Records of all examples, arm by arm, as they come.

        Args:
            examples: Those without a question are continued, in the arms that can be.
            arms: How their memory is shown.
            done: Arms' names and examples' numbers that are left out.
        """
        before, self.model.cached_encoder = self.model.cached_encoder, self._encode
        latent_size: int | None = None
        try:
            # Those with latents of one chunk size follow each other, and only their latents are kept.
            for arm in sorted(arms, key=lambda arm: arm.latent_size or 0):
                if arm.latent_size != latent_size:
                    self._latents.clear()
                    latent_size = arm.latent_size
                left = ((n, e) for n, e in enumerate(examples) if (arm.name, n) not in done)
                asked = [self._ask(n, e, arm) for n, e in left if e.question or not arm.needs_question]
                with tqdm(total=len(asked), desc=arm.name, unit="example", disable=None) as bar:
                    for batch in self._batches(asked):
                        yield from self._answers(batch, arm)
                        bar.update(len(batch))
        finally:
            self.model.cached_encoder = before
            self._latents.clear()

    def _ask(self, number: int, example: Example, arm: Arm) -> Asked:
        # The text of a continuation has no end token and nothing to spare.
        decoder = self.processor.tokenizers.decoder
        num_tokens = len(decoder(example.answer, add_special_tokens=False)["input_ids"])
        return Asked(number, example, self._prompt(example, arm), num_tokens)

    def _prompt(self, example: Example, arm: Arm) -> MemoryPrompt:
        """An example as an arm shows it."""
        shown = self._prompts.shown(arm, example.memory, example.question)
        if not example.question:
            return self.processor.parse_raw(shown, arm.latent_size)
        chat = example.messages(shown) if shown else [{"role": "user", "content": example.question}]
        return self._prompts.expand(arm, self.processor.parse_chat(chat, arm.latent_size), example.answer)

    def _batches(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Prompts and answers of like length side by side waste least; what is too long stands alone."""
        free = free_device_bytes(self.model.device)
        batch: list[Asked] = []
        for one in sorted(asked, key=_lengths):
            wider = [*batch, one]
            answered = all(item.example.question for item in wider)
            size = self.batch_size or prompts_that_fit(self.model.decoder, _most_rows(wider), free)
            if batch and not (answered and len(wider) <= size and self._fits(wider)):
                yield batch
                wider = [one]
            batch = wider
        if batch:
            yield batch

    def _fits(self, batch: Sequence[Asked]) -> bool:
        tokens = max(one.num_tokens for one in batch)
        return self._room is None or _most_rows(batch) + tokens + _SPARE_TOKENS <= self._room

    def _answers(self, batch: Sequence[Asked], arm: Arm) -> Iterator[dict[str, Any]]:
        """The records of a batch."""
        if not self._fits(batch):
            results: Sequence[dict[str, Any]] = [{"too_long": True}]
        else:
            began, self._encode_s = time.perf_counter(), 0.0
            results = self._generate(batch) if batch[0].example.question else [self._continue(batch[0])]
            read_ms = 1e3 * (time.perf_counter() - began - self._encode_s) / len(batch)
            results = [
                result | {"encode_ms": round(self._encode_ms(one.prompt), 2), "read_ms": round(read_ms, 2)}
                for one, result in zip(batch, results, strict=True)
            ]
        for one, result in zip(batch, results, strict=True):
            yield {
                "number": one.number,
                "task": one.example.task,
                "kind": one.example.kind,
                "condition": arm.name,
                "memory_tokens": self._prompts.num_tokens(one.example.memory),
                "prompt_rows": len(one.prompt.input_ids),
                "num_latents": one.prompt.num_latents,
                "text_rows": one.prompt.text_rows,
                **result,
            }

    def _generate(self, batch: Sequence[Asked]) -> list[dict[str, Any]]:
        num_tokens = max(one.num_tokens for one in batch) + _SPARE_TOKENS
        rows = self.model.generate([one.prompt for one in batch], max_new_tokens=num_tokens)
        results = []
        for one, row in zip(batch, rows, strict=True):
            answer, wanted = self.processor.tokenizers.decoder.decode(row, skip_special_tokens=True), one.example.answer
            results.append(
                {
                    "answer": answer,
                    "wanted": wanted,
                    "exact": is_exact(answer, wanted),
                    "contains": contains(answer, wanted),
                    "edit_similarity": round(edit_similarity(answer.strip(), wanted.strip()), 4),
                }
            )
        return results

    @torch.inference_mode()
    def _continue(self, one: Asked) -> dict[str, Any]:
        wanted = self.processor.tokenizers.decoder(one.example.answer, add_special_tokens=False)["input_ids"]
        whole = MemoryPrompt(input_ids=[*one.prompt.input_ids, *wanted], spans=one.prompt.spans)
        logits = self.model.decoder(inputs_embeds=self.model.embed_prompt(whole)[None]).logits[0]
        predicted = logits[len(one.prompt.input_ids) - 1 : -1].float()
        loss = F.cross_entropy(predicted, torch.tensor(wanted, device=predicted.device))
        return {"nll": float(loss), "tokens": len(wanted)}

    def _encode(self, spans: Sequence[MemorySpan]) -> list[torch.Tensor]:
        """Latents of spans: another arm's are taken again, the others waited for, so that their time is known."""
        new = list({_key(span): span for span in spans if _key(span) not in self._latents}.values())
        if new:
            began = time.perf_counter()
            latents = self.model.memory_encoder(new)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            seconds = time.perf_counter() - began
            self._encode_s += seconds
            ms = 1e3 * seconds / len(new)
            self._latents |= {_key(span): (own, ms) for span, own in zip(new, latents, strict=True)}
        return [self._latents[_key(span)][0] for span in spans]

    def _encode_ms(self, prompt: MemoryPrompt) -> float:
        return sum(self._latents[_key(span)][1] for span in prompt.spans)


def _key(span: MemorySpan) -> tuple[str, int]:
    return span.text, span.chunk_size


def _most_rows(batch: Sequence[Asked]) -> int:
    return max(len(one.prompt.input_ids) for one in batch)


def _lengths(one: Asked) -> tuple[int, int, int]:
    """Sorts prompts of about the same length, within a fifth, by the length of their answers."""
    rows = len(one.prompt.input_ids)
    return round(4 * math.log2(rows)), one.num_tokens, rows


def prompts_that_fit(decoder: Any, num_rows: int, free_bytes: int | None) -> int:
    """How many prompts of so many rows are generated together.

    On a GPU a third of the free memory is for keys and values; the rest is for activations of the first pass, and to
    spare. A CPU is busy with one long prompt, and reads it faster alone: padding needs a mask, and with one attention
    goes over all pairs of rows, not only over those that see each other.

    Args:
        decoder: The language model.
        num_rows: Of the longest of the prompts.
        free_bytes: Of the GPU; None for the CPU.
    """
    if free_bytes is None:
        return max(1, min(_CPU_PROMPTS, _CPU_ROWS // num_rows))
    return max(1, min(_MOST_CUDA_PROMPTS, free_bytes // 3 // TransformerCost.of(decoder).kv_cache_bytes(num_rows)))
