"""Several chunk sizes from one encoding: the same numbers as apart, the encoder runs once, rows hold whole examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from utils.errors import ConfigError, DatasetError
from utils.files import write_jsonl
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.training.config import TrainConfig, parse_config
from utils.training.data.cache import TokenCache
from utils.training.expanded import draw_shown
from utils.training.loop import Trainer
from utils.training.losses import TrainedPair
from utils.training.packing import ExampleStream, RowPacker
from utils.training.rows import Draw, PackedRow, pack, packed_length
from utils.training.toy import build_toy_pair

SIZES = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}


def row_of(number: int) -> dict[str, Any]:
    memory = "\n".join(f"n{number}_{line}={number * 10 + line}" for line in range(4 + number))
    messages = [{"role": "user", "content": f"{wrap(memory)}\nand {wrap('xyz' * number)}: n{number}_2?"}]
    return {"messages": messages, "target": str(number * 10 + 2)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    root = tmp_path_factory.mktemp("ratios")
    rows = [row_of(number) for number in range(1, 13)]
    write_jsonl(root / "rows.jsonl", rows)
    processor = Processor(tokenizers=build_toy_pair()[1], chunk_size=2)
    return TokenCache.build(root / "rows", root / "rows.jsonl", rows, processor)


def packer_of(cache: TokenCache, ratios: int, expanded: float = 0.0, row_tokens: int = 1200) -> RowPacker:
    stream = ExampleStream({"rows": cache}, {"rows": 1.0}, SIZES, seed="5", expanded=expanded, ratios=ratios)
    return RowPacker(stream, row_tokens, build_toy_pair()[1].markers)


def drawn_pair() -> tuple[CodeLLaVAModel, TrainedPair]:
    model, tokenizers = build_toy_pair()
    torch.nn.init.normal_(model.memory_encoder.adapter.fc1.bias)
    return model, TrainedPair(model, tokenizers.markers, unpack=True)


def loss_and_gradients(pair: TrainedPair, rows: list[PackedRow]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pair.zero_grad()
    loss = torch.stack([pair(row, False, True) for row in rows]).sum(dim=0)
    loss.sum().backward()
    return loss.detach(), {n: p.grad.clone() for n, p in pair.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixed", [False, True], ids=["latents", "text beside latents"])
def test_readings_from_one_encoding_are_those_of_encodings_of_their_own(cache: TokenCache, mixed: bool) -> None:
    model, pair = drawn_pair()
    torch.nn.init.normal_(pair.unpacker.maps, std=0.1)  # type: ignore[union-attr]
    markers = build_toy_pair()[1].markers

    def shown(number: int, size: int) -> tuple[int, ...]:
        return draw_shown(Random(number + size), cache[number], size) if mixed else ()

    numbers, sizes = (0, 3, 11), (2, 1, 8)
    together = [Draw("rows", n, 2, shown(n, 2), tuple((size, shown(n, size)) for size in sizes[1:])) for n in numbers]
    apart = [Draw("rows", n, size, shown(n, size)) for n in numbers for size in sizes]
    row, single = (pack([(draw, cache[draw.number]) for draw in draws], markers) for draws in (together, apart))
    assert mixed == any(span.segments for span in row.spans)
    assert row.lengths == single.lengths
    read: list[int] = []
    hook = model.code_chunker.encoder.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    loss, gradients = loss_and_gradients(pair, [row])
    tokens = sum(len(span) for n in numbers for span in cache[n].spans)
    assert sum(read) == row.memory_tokens == tokens
    hook.remove()
    expected, wanted = loss_and_gradients(pair, [single])
    assert single.memory_tokens == 3 * tokens
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


def test_a_memory_of_several_windows_is_read_at_each_size(cache: TokenCache) -> None:
    model, _ = drawn_pair()
    processor = Processor(tokenizers=build_toy_pair()[1], chunk_size=2)
    text = wrap("".join(Random(1).choices("abcdefgh", k=150)))  # windows of 64 tokens, the last one of 22
    (group,) = zip(*(processor.parse_raw(text, size).spans for size in (4, 1, 8)), strict=True)
    with torch.no_grad():
        (found,) = model.memory_encoder.at_several_sizes([group])
        for latents, span in zip(found, group, strict=True):
            assert len(latents) == span.num_latents
            torch.testing.assert_close(latents, model.memory_encoder([span])[0], rtol=1e-5, atol=1e-5)


def test_rows_have_room_for_all_readings_of_an_example(cache: TokenCache) -> None:
    packer = packer_of(cache, 3, expanded=0.5, row_tokens=900)
    for row in (packer.next_row() for _ in range(10)):
        assert len(row.input_ids) <= 900
        assert len(row.lengths) % 3 == 0
        assert {len(group) for group in row.shared} == {3}
        assert sorted(n for group in row.shared for n in group) == list(range(len(row.spans)))
        for group in row.shared:
            spans = [row.spans[n] for n in group]
            assert len({span.chunk_size for span in spans}) == 3
            assert len({bytes(span.token_ids) for span in spans}) == 1  # type: ignore[arg-type]
    draw = Draw("rows", 5, 4, (), ((1, ()), (2, ())))
    alone = [packed_length(cache[5], Draw("rows", 5, size)) for size in (4, 1, 2)]
    assert packed_length(cache[5], draw) == sum(alone)


def test_more_readings_change_no_other_draw(cache: TokenCache) -> None:
    one, three = (packer_of(cache, ratios, expanded=0.5).stream for ratios in (1, 3))
    for _ in range(50):
        before, after = one.next(), three.next()
        assert before.readings[0] == after.readings[0]
        assert (before.number, len(before.readings), len(after.readings)) == (after.number, 1, 3)
    plain = packer_of(cache, 1).next_row()
    assert plain.shared == ()


def test_a_resumed_stream_reads_at_the_same_sizes(cache: TokenCache) -> None:
    packer = packer_of(cache, 2, expanded=0.5)
    for _ in range(3):
        packer.next_row()
    resumed = packer_of(cache, 2, expanded=0.5)
    resumed.restore(json.loads(json.dumps(packer.state())))
    for _ in range(4):
        mine, theirs = resumed.next_row(), packer.next_row()
        assert torch.equal(mine.input_ids, theirs.input_ids)
        assert mine.shared == theirs.shared
    with pytest.raises(DatasetError, match="other data"):
        packer_of(cache, 3).restore(packer.state())


def test_a_run_reads_every_example_twice(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = run_values()
    values["stages"] = [{**values["stages"][1], "ratios": 2, "steps": 1}]
    trainer = Trainer(parse_config(values), device="cpu")
    assert trainer.run() == "done"
    rows = trainer.step_rows(trainer.packer(0), trainer.config.stages[0])
    assert all(len(group) == 2 for row in rows for group in row.shared)


def test_more_readings_than_chunk_sizes_are_an_error(run_config: Callable[..., TrainConfig]) -> None:
    stage = {"preset": "adapter", "steps": 1, "chunk_sizes": {1: 1, 2: 1, 4: 0}, "ratios": 3}
    with pytest.raises(ConfigError, match="from 1 to 2, got 3"):
        run_config(stages=[stage])


def test_a_pair_whose_states_know_the_chunk_size_is_refused() -> None:
    model, tokenizers = build_toy_pair()
    spans = Processor(tokenizers=tokenizers, chunk_size=2).parse_raw(wrap("abcdef"), 2).spans
    model.code_chunker.config = dataclasses.replace(model.config, window_follows=True)
    with pytest.raises(ConfigError, match="a window is one chunk"):
        model.memory_encoder.at_several_sizes([spans])
