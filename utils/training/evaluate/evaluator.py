"""One pair on held-out examples under several conditions.

    memory@8       the memory compressed at chunk size 8
    truncated@8    as many rows of plain text: the beginning of the memory
    full           the memory as plain text, uncompressed

    evaluator = Evaluator(model, processor)
    records = evaluator.run(examples, conditions)

A record is one example under one condition, a JSON object. Greedy decoding throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.limits import free_device_bytes
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.model.prompt import MemoryPrompt, num_latents
from utils.training.data.examples import Example
from utils.training.evaluate.scores import contains, edit_similarity, is_exact
from utils.training.flops import TransformerCost

FULL, MEMORY, TRUNCATED = "full", "memory", "truncated"
# Room for an answer that says more than was asked.
_SPARE_TOKENS = 16
_CPU_PROMPTS, _MOST_CUDA_PROMPTS = 8, 128


@dataclass(frozen=True, slots=True)
class Condition:
    """How the memory is shown.

    Attributes:
        kind: `FULL`, `MEMORY` or `TRUNCATED`.
        chunk_size: Encoder tokens per latent; 1 for full text.
    """

    kind: str
    chunk_size: int = 1

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.kind if self.kind == FULL else f"{self.kind}@{self.chunk_size}"


def all_conditions(chunk_sizes: Sequence[int]) -> list[Condition]:
    """Full text, and for each chunk size memory and truncation to as many rows."""
    return [Condition(FULL), *(Condition(kind, size) for size in chunk_sizes for kind in (MEMORY, TRUNCATED))]


@dataclass(frozen=True)
class Evaluator:
    """A pair that answers.

    Attributes:
        model: In eval mode.
        processor: Parses prompts for it.
        batch_size: Prompts generated together; None: by device, on a GPU as many as there is memory for.
    """

    model: CodeLLaVAModel
    processor: Processor
    batch_size: int | None = None

    def run(self, examples: Sequence[Example], conditions: Sequence[Condition]) -> Iterator[dict[str, Any]]:
        """Records of all examples under all conditions, condition by condition."""
        asked = [(i, e) for i, e in enumerate(examples) if e.question]
        read = [(i, e) for i, e in enumerate(examples) if not e.question]
        for condition in conditions:
            with tqdm(total=len(examples), desc=condition.name, unit="example", disable=None) as bar:
                yield from self._answers(asked, condition, bar)
                yield from self._continuations(read, condition, bar)

    def _answers(
        self, examples: Sequence[tuple[int, Example]], condition: Condition, bar: Any
    ) -> Iterator[dict[str, Any]]:
        # Prompts and answers of like length side by side waste least.
        size = self._chunk_size(condition)
        prompts = {i: self.processor.parse_chat(e.messages(self._shown(e, condition)), size) for i, e in examples}
        order = sorted(examples, key=lambda item: (len(item[1].answer), len(prompts[item[0]].input_ids)))
        longest = max((len(prompt.input_ids) for prompt in prompts.values()), default=1)
        batch_size = self.batch_size or prompts_that_fit(
            self.model.decoder, longest, free_device_bytes(self.model.device)
        )
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            num_tokens = max(len(self.processor.target_ids(e.answer)) for _, e in batch) + _SPARE_TOKENS
            ids = self.model.generate([prompts[i] for i, _ in batch], max_new_tokens=num_tokens)
            for (number, example), row in zip(batch, ids, strict=True):
                answer = self.processor.tokenizers.decoder.decode(row, skip_special_tokens=True)
                yield self._record(number, example, condition, prompts[number]) | {
                    "answer": answer,
                    "wanted": example.answer,
                    "exact": is_exact(answer, example.answer),
                    "contains": contains(answer, example.answer),
                    "edit_similarity": round(edit_similarity(answer.strip(), example.answer.strip()), 4),
                }
            bar.update(len(batch))

    @torch.inference_mode()
    def _continuations(
        self, examples: Sequence[tuple[int, Example]], condition: Condition, bar: Any
    ) -> Iterator[dict[str, Any]]:
        decoder = self.processor.tokenizers.decoder
        for number, example in examples:
            shown = self._shown(example, condition)
            prompt = self.processor.parse_raw(shown, self._chunk_size(condition))
            wanted = decoder(example.answer, add_special_tokens=False)["input_ids"]
            whole = MemoryPrompt(input_ids=[*prompt.input_ids, *wanted], spans=prompt.spans)
            logits = self.model.decoder(inputs_embeds=self.model.embed_prompt(whole)[None]).logits[0]
            predicted = logits[len(prompt.input_ids) - 1 : -1].float()
            loss = F.cross_entropy(predicted, torch.tensor(wanted, device=predicted.device))
            yield self._record(number, example, condition, prompt) | {"nll": float(loss), "tokens": len(wanted)}
            bar.update(1)

    def _record(self, number: int, example: Example, condition: Condition, prompt: MemoryPrompt) -> dict[str, Any]:
        return {
            "number": number,
            "task": example.task,
            "kind": example.kind,
            "condition": condition.name,
            "memory_tokens": len(self._memory_ids(example)),
            "prompt_rows": len(prompt.input_ids),
            "num_latents": prompt.num_latents,
        }

    def _shown(self, example: Example, condition: Condition) -> str:
        """What stands in the memory's place."""
        if condition.kind == MEMORY:
            return wrap(example.memory)
        if condition.kind == FULL:
            return example.memory
        ids = self._memory_ids(example)
        return self.processor.tokenizers.encoder.decode(ids[: num_latents(len(ids), condition.chunk_size)])

    def _memory_ids(self, example: Example) -> list[int]:
        return self.processor.tokenizers.encoder(example.memory, add_special_tokens=False)["input_ids"]

    def _chunk_size(self, condition: Condition) -> int:
        return condition.chunk_size if condition.kind == MEMORY else self.processor.chunk_size


def prompts_that_fit(decoder: Any, num_rows: int, free_bytes: int | None) -> int:
    """How many prompts of so many rows are generated together; None for the CPU, which more prompts do not speed up.

    A third of the free memory is for keys and values; the rest is for activations of the first pass, and to spare.
    """
    if free_bytes is None:
        return _CPU_PROMPTS
    return max(1, min(_MOST_CUDA_PROMPTS, free_bytes // 3 // TransformerCost.of(decoder).kv_cache_bytes(num_rows)))
