"""Log-likelihoods of continuations, given prompts with memory.

    scores = score_continuations(model, [(prompt, ids)], batch_size=4)
    log_likelihood, is_greedy = scores[0]

Shape legend: B prompts, T rows, D decoder width, K tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.generate import pad_left
from utils.model.limits import explain_out_of_memory
from utils.model.prompt import MemoryPrompt

Scored = tuple[MemoryPrompt, Sequence[int]]
# Rows of logits of one pass: with 150,000 tokens in the vocabulary they take 0.6 GB in float32.
_MOST_LOGIT_ROWS = 1024


@torch.inference_mode()
def score_continuations(
    model: CodeLLaVAModel,
    pairs: Sequence[Scored],
    batch_size: int,
    on_done: Callable[[int], object] = lambda number: None,
) -> list[tuple[float, bool]]:
    """Score continuations, those of like lengths together.

    Continuations of one prompt that differ in their last token only, such as the letters of a choice, share a row.

    Args:
        model: In eval mode.
        pairs: Prompts, and at least one decoder token that follows each. Equal prompts may be one object.
        batch_size: Rows of one forward pass.
        on_done: Told how many more are done.

    Returns:
        For each pair the natural logarithm of its tokens' probability, and whether each is the likeliest one.

    Raises:
        ConfigError: There is not memory enough.
    """
    sharing: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, (prompt, ids) in enumerate(pairs):
        sharing.setdefault((id(prompt), tuple(ids[:-1])), []).append(number)
    groups = list(sharing.values())
    firsts = [pairs[numbers[0]] for numbers in groups]
    scores: dict[int, tuple[float, bool]] = {}
    for batch in _batches(firsts, batch_size):
        for row, logits_KV in zip(batch, _logits(model, [firsts[row] for row in batch]), strict=True):
            numbers = groups[row]
            all_K, likeliest_K = logits_KV.logsumexp(dim=-1), logits_KV.argmax(dim=-1)
            for number in numbers:
                ids_K = torch.tensor(pairs[number][1], device=logits_KV.device)
                log_probabilities_K = logits_KV.gather(1, ids_K[:, None])[:, 0] - all_K
                scores[number] = float(log_probabilities_K.sum()), bool((likeliest_K == ids_K).all())
            on_done(len(numbers))
    return [scores[number] for number in range(len(pairs))]


def embed_each_once(model: CodeLLaVAModel, prompts: Sequence[MemoryPrompt]) -> list[torch.Tensor]:
    """Rows [T, D] of prompts, of which several may be one object: its memory is encoded once."""
    different = {id(prompt): prompt for prompt in prompts}
    rows = dict(zip(different, model.embed_prompts(list(different.values())), strict=True))
    return [rows[id(prompt)] for prompt in prompts]


def _batches(rows: Sequence[Scored], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows that are read together; the longest first, so that what does not fit fails at once."""

    def size(number: int) -> tuple[int, int]:
        prompt, ids = rows[number]
        return len(prompt.input_ids) + len(ids), len(ids)

    batch: list[int] = []
    for number in sorted(range(len(rows)), key=size, reverse=True):
        wider = [*batch, number]
        longest = max(size(row)[1] for row in wider)
        if batch and (len(wider) > batch_size or len(wider) * longest > _MOST_LOGIT_ROWS):
            yield batch
            wider = [number]
        batch = wider
    if batch:
        yield batch


def _logits(model: CodeLLaVAModel, pairs: Sequence[Scored]) -> list[torch.Tensor]:
    """Logits [K, V] in float32 at the rows that foretell each pair's continuation."""
    prompts = embed_each_once(model, [prompt for prompt, _ in pairs])
    table = model.decoder.get_input_embeddings()
    # The last token is foretold, never read.
    read = [table(torch.tensor(ids[:-1], dtype=torch.long, device=model.device)) for _, ids in pairs]
    rows = [torch.cat([prompt, more.to(prompt.dtype)]) for prompt, more in zip(prompts, read, strict=True)]
    embeds_BTD, mask_BT = pad_left(rows)
    longest = max(len(ids) for _, ids in pairs)
    doing = f"scoring {len(rows)} continuations of prompts of up to {embeds_BTD.shape[1]} rows"
    with explain_out_of_memory(doing, "lower batch_size"):
        logits_BKV = model.decoder(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest,
        ).logits
    # All prompts end together: padding stands on the left.
    return [logits_BKV[row, -len(ids) :].float() for row, (_, ids) in enumerate(pairs)]
