"""The unpack loss: what it is at first, one token at a time, and that it teaches latents the order in a chunk."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.model.prompt import MemorySpan
from utils.training.toy import build_toy_pair
from utils.training.unpacking import MAX_PLACES, Unpacker, unpacked_tokens


def span(token_ids: list[int], chunk_size: int) -> MemorySpan:
    rows = -(-len(token_ids) // chunk_size)
    return MemorySpan(text="", token_ids=token_ids, start=0, stop=rows, chunk_size=chunk_size)


def random_maps(width: int, table_width: int) -> Unpacker:
    torch.manual_seed(0)
    unpacker = Unpacker(width, table_width)
    torch.nn.init.normal_(unpacker.maps)
    return unpacker


def test_at_first_every_token_of_the_row_is_as_likely() -> None:
    spans = [span([5, 6, 7, 8, 5], 2), span([9, 9, 9, 9], 4)]
    latents = [torch.randn(s.num_latents, 6) for s in spans]
    loss = Unpacker(6, 3)(latents, spans, torch.randn(10, 3))
    assert unpacked_tokens(spans) == 9
    assert float(loss.detach()) == pytest.approx(9 * math.log(5))


def test_it_is_the_loss_of_one_token_at_a_time() -> None:
    spans = [span([5, 6, 7, 8, 5], 2), span([9, 4], 2), span([3, 1, 2], 3), span([1] * 20, MAX_PLACES + 1)]
    latents = [torch.randn(s.num_latents, 6) for s in spans]
    table = torch.randn(10, 4)
    unpacker = random_maps(6, 4)
    candidates = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    rows = torch.stack([table[c] / table[c].norm() for c in candidates])
    expected = 0.0
    for s, latent in zip(spans[:3], latents, strict=False):
        for number, token in enumerate(s.token_ids):
            guess = unpacker.norm(latent[number // s.chunk_size]) @ unpacker.maps[number % s.chunk_size]
            loss = F.cross_entropy(rows @ guess, torch.tensor(candidates.index(token)))
            expected += float(loss.detach())
    assert float(unpacker(latents, spans, table).detach()) == pytest.approx(expected, rel=1e-5)
    assert unpacked_tokens(spans) == 10


def test_a_row_without_short_chunks_still_reaches_every_parameter() -> None:
    unpacker = random_maps(6, 4)
    spans = [span([1] * 20, MAX_PLACES + 1)]
    unpacker([torch.randn(3, 6)], spans, torch.randn(10, 4)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in unpacker.parameters())


@pytest.mark.slow
def test_latents_learn_the_order_in_their_chunks() -> None:
    model, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    text = wrap("abbaabcddcbabcacbd")
    spans = processor.parse_raw(text, 2).spans
    table = model.memory_encoder.chunker.encoder.get_input_embeddings().weight
    unpacker = Unpacker(model.decoder.config.hidden_size, table.shape[1])
    optimizer = torch.optim.AdamW([*model.memory_encoder.parameters(), *unpacker.parameters()], lr=3e-3)
    for _ in range(60):
        loss = unpacker(model.memory_encoder(spans), spans, table) / unpacked_tokens(spans)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
