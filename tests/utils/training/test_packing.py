"""Packed rows: what is in them, that packing changes neither loss nor gradients, and that a stream can be resumed."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path

import pytest
import torch

from tests.support.reference import next_token_losses
from utils.errors import DatasetError
from utils.files import read_jsonl
from utils.model.processor import Processor
from utils.training.data.cache import TokenCache
from utils.training.losses import TrainedPair, loss_units
from utils.training.packing import ExampleStream, RowPacker, packed_ahead
from utils.training.rows import Draw, pack, packed_length
from utils.training.toy import build_toy_pair

IGNORED_LABEL = -100
SIZES = {1: 1.0, 2: 1.0, 4: 1.0}


@pytest.fixture(scope="module")
def caches(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenCache]:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    root = tmp_path_factory.mktemp("caches")
    extra = root / "text.jsonl"
    extra.write_text(
        '{"text": "see <|memory_start|>abcdefgh<|memory_end|> and <|memory_start|>xyz<|memory_end|> there"}\n'
        '{"text": "<|memory_start|>q<|memory_end|>r"}\n'
    )
    files = [*toy_data.glob("*.jsonl"), extra]
    return {f.stem: TokenCache.build(root / f.stem, f, read_jsonl(f), processor) for f in files}


def packer_of(caches: dict[str, TokenCache], row_tokens: int = 200, memory_tokens: int | None = None) -> RowPacker:
    _, tokenizers = build_toy_pair()
    stream = ExampleStream(caches, dict.fromkeys(caches, 1.0), SIZES, seed="7")
    return RowPacker(stream, row_tokens, tokenizers.markers, memory_tokens)


def test_a_row_holds_each_example_as_the_processor_reads_it(caches: dict[str, TokenCache], toy_data: Path) -> None:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    rows = list(read_jsonl(toy_data / "copy_symbols.jsonl"))[:5]
    cache = caches["copy_symbols"]
    packed = pack([(Draw("copy_symbols", i, 4), cache[i]) for i in range(5)], tokenizers.markers)
    expected = []
    for row in rows:
        ids, target = processor.parse_chat(row["messages"], 4).input_ids, processor.target_ids(row["target"])
        expected.append(([*ids, *target], [IGNORED_LABEL] * len(ids) + target))
    at, found = 0, []
    for length in packed.lengths:
        ids = packed.input_ids[at : at + length].tolist()
        labels = [IGNORED_LABEL] * length
        for row_index, label in zip(packed.label_rows.tolist(), packed.labels.tolist(), strict=True):
            if at <= row_index < at + length:
                labels[row_index - at + 1] = label
        found.append((ids, labels))
        assert packed.position_ids[at : at + length].tolist() == list(range(length))
        at += length
    assert sorted(found) == sorted(expected)


def test_labels_are_text_outside_spans_only(caches: dict[str, TokenCache]) -> None:
    _, tokenizers = build_toy_pair()
    packed = pack([(Draw("text", 0, 2), caches["text"][0])], tokenizers.markers)
    # The first token has nothing before it that could predict it.
    assert tokenizers.decoder.decode(packed.labels) == "ee  and  there"
    assert [(s.start, s.stop, s.num_latents) for s in packed.spans] == [(5, 9, 4), (16, 18, 2)]


def test_packed_loss_and_gradients_are_those_of_one_example_at_a_time(caches: dict[str, TokenCache]) -> None:
    model, tokenizers = build_toy_pair()
    torch.nn.init.normal_(model.memory_encoder.adapter.fc1.bias)
    pair = TrainedPair(model, tokenizers.markers)
    torch.nn.init.normal_(pair.marker_rows.delta, std=0.1)
    chosen = [(Draw(task, i, size), cache[i]) for task, cache in caches.items() for i, size in ((0, 1), (1, 4))]

    def loss_and_gradients(groups: list[list[tuple[Draw, object]]]) -> tuple[float, dict[str, torch.Tensor]]:
        pair.zero_grad()
        losses = [pair(pack(group, tokenizers.markers)) for group in groups]  # type: ignore[arg-type]
        torch.stack(losses).sum().backward()
        return float(torch.stack(losses).detach().sum()), {
            n: p.grad.clone() for n, p in pair.named_parameters() if p.grad is not None
        }

    packed_loss, packed_gradients = loss_and_gradients([chosen])
    single_loss, single_gradients = loss_and_gradients([[item] for item in chosen])
    assert packed_loss == pytest.approx(single_loss, rel=1e-5)
    assert packed_gradients.keys() == single_gradients.keys()
    assert any("encoder" in name for name in packed_gradients)
    assert "marker_rows.delta" in packed_gradients
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, single_gradients[name], rtol=1e-5, atol=1e-5)


def test_a_length_discount_counts_by_answer(caches: dict[str, TokenCache], tmp_path: Path) -> None:
    _, tokenizers = build_toy_pair()
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    source = tmp_path / "chat.jsonl"
    source.write_text("")
    turns = [("<|memory_start|>abcd<|memory_end|>?", "a"), ("and?", "bcdefgh")]
    messages = [{"role": r, "content": x} for turn in turns for r, x in zip(("user", "assistant"), turn, strict=True)]
    cache = TokenCache.build(tmp_path / "chat", source, [{"messages": messages}], processor)
    packed = pack([(Draw("chat", 0, 2), cache[0])], tokenizers.markers, length_discount=1.0)
    # An answer's labels are its letters and the end token.
    assert packed.label_weights.tolist() == pytest.approx([1 / 2] * 2 + [1 / 8] * 8)
    assert tokenizers.decoder.decode(packed.labels, skip_special_tokens=True) == "abcdefgh"


def test_a_length_discount_of_one_counts_examples_alike(caches: dict[str, TokenCache]) -> None:
    model, tokenizers = build_toy_pair()
    torch.nn.init.normal_(model.memory_encoder.adapter.fc1.bias)
    pair = TrainedPair(model, tokenizers.markers)
    # Examples of one answer each, of different lengths.
    chosen = [
        (Draw(task, i, 2), caches[task][i]) for task, i in (("copy_symbols", 0), ("copy_symbols", 1), ("text", 0))
    ]
    rows = [pack([item], tokenizers.markers) for item in chosen]
    assert len({row.num_labels for row in rows}) > 1
    means = [pair(row) / row.num_labels for row in rows]
    packed = pack(chosen, tokenizers.markers, length_discount=1.0)
    assert loss_units(packed, align=False) == pytest.approx(len(chosen))
    torch.testing.assert_close(pair(packed), torch.stack(means).sum(), rtol=1e-5, atol=1e-5)


def test_the_packed_loss_is_the_model_s_own(toy_data: Path, caches: dict[str, TokenCache]) -> None:
    model, tokenizers = build_toy_pair()
    reference = copy.deepcopy(model)
    processor = Processor(tokenizers=tokenizers, chunk_size=2)
    row = next(iter(read_jsonl(toy_data / "copy_symbols.jsonl")))
    prompt = processor.parse_chat(row["messages"], 2)
    packed = pack([(Draw("copy_symbols", 0, 2), caches["copy_symbols"][0])], tokenizers.markers)
    mine = TrainedPair(model, tokenizers.markers)(packed) / packed.num_labels
    expected = next_token_losses(reference, processor, prompt, row["target"]).mean()
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_pieces_of_the_head_change_nothing(caches: dict[str, TokenCache]) -> None:
    model, tokenizers = build_toy_pair()
    row = packer_of(caches).next_row()
    whole, pieces = (TrainedPair(model, tokenizers.markers, head_rows=n) for n in (None, 7))
    torch.testing.assert_close(pieces(row), whole(row))


def test_rows_are_filled_and_never_overfilled(caches: dict[str, TokenCache]) -> None:
    packer = packer_of(caches, row_tokens=150, memory_tokens=60)
    rows = [packer.next_row() for _ in range(20)]
    assert all(len(row.input_ids) <= 150 and row.memory_tokens <= 60 for row in rows)
    assert sum(len(row.lengths) for row in rows) > 60
    assert len({span.chunk_size for span in rows[0].spans}) > 1


def test_a_resumed_stream_sees_what_an_uninterrupted_one_sees(caches: dict[str, TokenCache]) -> None:
    packer = packer_of(caches)
    for _ in range(4):
        packer.next_row()
    resumed = packer_of(caches)
    resumed.restore(packer.state())
    for _ in range(6):
        assert torch.equal(packer.next_row().input_ids, resumed.next_row().input_ids)


def test_rows_packed_ahead_are_the_same_and_so_is_the_cursor(caches: dict[str, TokenCache]) -> None:
    plain, ahead = packer_of(caches), packer_of(caches)
    with contextlib.closing(packed_ahead(ahead, lambda: [ahead.next_row(), ahead.next_row()])) as steps:
        for rows, cursor in itertools.islice(steps, 4):
            for row in rows:
                expected = plain.next_row()
                assert torch.equal(row.input_ids, expected.input_ids)
                assert torch.equal(row.labels, expected.labels)
            assert cursor == plain.state()
    resumed = packer_of(caches)
    resumed.restore(cursor)
    assert torch.equal(resumed.next_row().input_ids, plain.next_row().input_ids)


def test_an_error_while_packing_ahead_comes_with_its_step(caches: dict[str, TokenCache]) -> None:
    packer = packer_of({"copy_symbols": caches["copy_symbols"]}, row_tokens=5)
    steps = packed_ahead(packer, lambda: [packer.next_row()])
    with contextlib.closing(steps), pytest.raises(DatasetError, match="longer than row_tokens 5"):
        next(steps)


def test_an_epoch_shows_every_example_once(caches: dict[str, TokenCache]) -> None:
    stream = ExampleStream(caches, {"find_symbol": 1.0}, SIZES, seed="1")
    first = [stream.next().number for _ in range(60)]
    second = [stream.next().number for _ in range(60)]
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second


def test_examples_longer_than_a_row_are_counted(caches: dict[str, TokenCache]) -> None:
    lengths = [packed_length(caches["copy_symbols"][i], Draw("copy_symbols", i, 1)) for i in range(60)]
    middle = sorted(lengths)[30]
    packer = packer_of({"copy_symbols": caches["copy_symbols"]}, row_tokens=middle)
    for _ in range(40):
        packer.next_row()
    assert packer.too_long > 0
    with pytest.raises(DatasetError, match="longer than row_tokens 5"):
        packer_of({"copy_symbols": caches["copy_symbols"]}, row_tokens=5).next_row()
