"""The teacher: what it reads, whose labels it teaches, the divergence itself, and that nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.errors import ConfigError, DatasetError
from utils.files import read_jsonl, write_jsonl
from utils.model.markers import wrap
from utils.model.processor import Processor
from utils.training.config import TrainConfig, parse_config
from utils.training.data.cache import TokenCache, tokenize_row
from utils.training.loop import Trainer
from utils.training.lora import add_lora
from utils.training.losses import TrainedPair
from utils.training.packing import ExampleStream, RowPacker
from utils.training.rows import Draw, PackedRow, pack
from utils.training.teaching import teacher_length
from utils.training.toy import build_toy_pair

TOKENIZERS = build_toy_pair()[1]
PROCESSOR = Processor(tokenizers=TOKENIZERS, chunk_size=2)


def rows_of() -> list[dict[str, Any]]:
    """Two questions about one span, two spans, a chat, and plain text around its memory."""
    two = [("user", f"{wrap('abcdefgh')}\n1?"), ("assistant", "ab"), ("user", "2?"), ("assistant", "gh")]
    return [
        {"messages": [{"role": role, "content": content} for role, content in two]},
        {"messages": [{"role": "user", "content": f"{wrap('xyz')} or {wrap('pq')}?"}], "target": "pq"},
        {"text": f"see {wrap('stop <|end|>')} and {wrap('kl')} there"},
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    root = tmp_path_factory.mktemp("taught")
    write_jsonl(root / "rows.jsonl", rows_of())
    return TokenCache.build(root / "rows", root / "rows.jsonl", rows_of(), PROCESSOR)


@pytest.fixture
def pair() -> TrainedPair:
    """With a LoRA and marker rows that have learnt something, and latents that are not all one."""
    model, _ = build_toy_pair()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.memory_encoder.adapter.fc1.bias)
    made = TrainedPair(model, TOKENIZERS.markers)
    add_lora(made.decoder, rank=4, alpha=8)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "marker_rows" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def taught_row(cache: TokenCache, draws: list[Draw]) -> PackedRow:
    return pack([(draw, cache[draw.number]) for draw in draws], TOKENIZERS.markers, 0.5, taught=True)


def with_right_answers(pair: TrainedPair, row: PackedRow, wrong: tuple[int, ...] = ()) -> PackedRow:
    """The labels of all answers but some changed to what the teacher says, given the ids that stand there."""
    assert row.teacher is not None
    labels = row.teacher.labels.clone()
    with torch.no_grad():
        hidden, trained, _ = pair.read_text(row.teacher)
        greedy = pair.logits(hidden, *([] if trained is None else [trained])).argmax(-1)
    said = ~torch.isin(row.teacher.answers, torch.tensor(wrong))
    labels[said] = greedy[said]
    # One wrong label makes a whole answer wrong.
    for answer in wrong:
        (places,) = (row.teacher.answers == answer).nonzero(as_tuple=True)
        labels[places] = greedy[places]
        labels[places[-1]] = (greedy[places[-1]] + 1) % 90
    teacher = dataclasses.replace(row.teacher, labels=labels)
    return dataclasses.replace(row, labels=labels[row.teacher.label_of], teacher=teacher)


def text_ids(row: dict[str, Any]) -> list[int]:
    """A row's ids with its markers taken away, as the tokenizer itself gives them; a toy's tokens are characters."""
    plain = copy.deepcopy(row)
    if "text" in plain:
        text = plain["text"].replace("<|memory_start|>", "").replace("<|memory_end|>", "")
        return TOKENIZERS.decoder(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    target = PROCESSOR.target_ids(plain.get("target", plain["messages"][-1]["content"]))
    messages = plain["messages"] if "target" in plain else plain["messages"][:-1]
    for message in messages:
        message["content"] = message["content"].replace("<|memory_start|>", "").replace("<|memory_end|>", "")
    return [*PROCESSOR.parse_chat(messages).input_ids, *target]


def test_the_teacher_reads_the_text_and_has_the_same_labels(cache: TokenCache) -> None:
    row = taught_row(cache, [Draw("rows", n, 2) for n in range(3)])
    teacher = row.teacher
    assert teacher is not None
    assert sorted(teacher.lengths) == sorted(teacher_length(cache[n]) for n in range(3))
    found = [ids.tolist() for ids in teacher.input_ids.split(teacher.lengths)]
    assert sorted(found) == sorted(text_ids(made) for made in rows_of())
    assert teacher.position_ids.tolist() == [at for length in teacher.lengths for at in range(length)]
    assert teacher.labels[teacher.label_of].tolist() == row.labels.tolist()
    assert sorted(teacher.label_of.tolist()) == list(range(row.num_labels))
    assert teacher.input_ids[teacher.label_rows + 1].tolist() == teacher.labels.tolist()
    # Two answers of the chat, one of the question, one text.
    assert teacher.num_answers == 4
    assert len(teacher.labels) == sum(stop - first for n in (0, 1) for first, stop in cache[n].targets) + len(
        "ee  and  there"
    )


def reference_divergence(pair: TrainedPair, row: PackedRow, right: set[int], untouched: set[str]) -> float:
    """Label by label, each sequence alone, by the formula."""
    assert row.teacher is not None
    student = pair.logits(pair.label_states(row, pair.latents(row))).log_softmax(-1)
    total = 0.0
    starts = np.cumsum([0, *row.teacher.lengths])
    for label, place in enumerate(row.teacher.label_of.tolist()):
        if int(row.teacher.answers[place]) not in right:
            continue
        at = int(row.teacher.label_rows[place])
        number = int(np.searchsorted(starts, at, side="right")) - 1
        ids = row.teacher.input_ids[starts[number] : starts[number + 1]]
        decoder = copy.deepcopy(pair.decoder)
        decoder.set_attn_implementation("eager")
        if TOKENIZERS.decoder.decode(ids) in untouched:
            for name, parameter in decoder.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
            logits = decoder(ids[None]).logits[0, at - starts[number]]
        else:
            hidden = decoder.get_decoder()(ids[None]).last_hidden_state[0, at - starts[number]]
            logits = pair.logits(hidden[None])[0]
        wanted = logits.log_softmax(-1)
        total += float(row.label_weights[label] * (wanted.exp() * (wanted - student[label])).sum())
    return total


@pytest.mark.parametrize("chat", [False, True], ids=["trained teacher", "one of them untouched"])
def test_the_divergence_is_that_of_the_formula(cache: TokenCache, pair: TrainedPair, chat: bool) -> None:
    row = taught_row(cache, [Draw("rows", 0, 2), Draw("chat" if chat else "rows", 1, 4), Draw("rows", 2, 1)])
    assert row.teacher is not None
    assert (row.teacher.is_trained is not None) == chat
    row = with_right_answers(pair, row, wrong=(1,))
    assert row.teacher is not None
    with torch.no_grad():
        loss, divergence, right = pair(row).tolist()
        untouched = {"".join(TOKENIZERS.decoder.decode(text_ids(rows_of()[1])))} if chat else set()
        expected = reference_divergence(pair, row, {0, 2, 3}, untouched)
        alone = pair(dataclasses.replace(row, teacher=None))
    assert divergence == pytest.approx(expected, rel=1e-4)
    assert divergence > 0.01
    assert loss == float(alone)
    is_right = row.teacher.answers[row.teacher.label_of] != 1
    assert right == pytest.approx(float(row.label_weights[is_right].sum()))
    if chat:
        # With its LoRA it would be another teacher.
        teacher = dataclasses.replace(row.teacher, is_trained=None)
        with torch.no_grad():
            assert pair(dataclasses.replace(row, teacher=teacher))[1] != pytest.approx(divergence, rel=1e-3)


def test_pieces_and_bfloat16_change_rounding_only(
    cache: TokenCache, pair: TrainedPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = [Draw("rows", 0, 2), Draw("chat", 1, 4), Draw("rows", 2, 1)]
    row = with_right_answers(pair, taught_row(cache, draws), wrong=(2,))
    whole = pair(row)
    whole[1].backward()
    gradient = pair.memory_encoder.adapter.fc2.weight.grad.clone()  # type: ignore[union-attr]
    assert gradient.abs().sum() > 0
    pair.zero_grad()
    monkeypatch.setattr(TrainedPair, "head_rows", 5)
    pieces = pair(row)
    pieces[1].backward()
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(pair.memory_encoder.adapter.fc2.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(pair(row)).all()


def test_a_teacher_that_is_wrong_teaches_nothing(cache: TokenCache, pair: TrainedPair) -> None:
    row = with_right_answers(pair, taught_row(cache, [Draw("rows", 0, 2)]), wrong=(0, 1))
    assert pair(row)[1:].tolist() == [0, 0]


def test_every_reading_of_an_example_has_its_teacher(cache: TokenCache, pair: TrainedPair) -> None:
    both = taught_row(cache, [Draw("rows", 0, 2, (), ((4, ()),)), Draw("rows", 1, 4, (), ((1, ()),))])
    assert both.teacher is not None
    assert len(both.teacher.lengths) == 2
    assert len(both.teacher.label_of) == 2 * len(both.teacher.labels)
    both = with_right_answers(pair, both)
    singles = [
        with_right_answers(pair, taught_row(cache, [Draw("rows", n, size)]))
        for n, size in ((0, 2), (0, 4), (1, 4), (1, 1))
    ]
    with torch.no_grad():
        torch.testing.assert_close(pair(both), torch.stack([pair(row) for row in singles]).sum(0), rtol=1e-4, atol=1e-5)


def test_who_learns_from_the_teacher_comes_to_say_what_it_says(cache: TokenCache, pair: TrainedPair) -> None:
    row = with_right_answers(pair, taught_row(cache, [Draw("rows", n, 2) for n in range(3)]))
    learns = list(pair.memory_encoder.parameters())
    for parameter in pair.decoder.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(learns, lr=1e-3)
    divergences = []
    for _ in range(15):
        divergence = pair(row)[1]
        divergences.append(float(divergence.detach()))
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
    assert divergences[-1] < 0.6 * divergences[0]


def stream_of(cache: TokenCache) -> ExampleStream:
    return ExampleStream({"rows": cache}, {"rows": 1.0}, {1: 1.0, 2: 1.0}, seed="1")


def test_without_a_teacher_rows_and_losses_are_what_they_were(cache: TokenCache, pair: TrainedPair) -> None:
    plain, taught = (
        RowPacker(stream_of(cache), 200, TOKENIZERS.markers, teacher_tokens=room).next_row() for room in (None, 512)
    )
    assert plain.teacher is None
    assert taught.teacher is not None
    for name in ("input_ids", "position_ids", "label_rows", "labels", "label_weights"):
        assert torch.equal(getattr(plain, name), getattr(taught, name))
    with torch.no_grad():
        loss = pair(plain)
        assert loss.shape == ()
        assert pair(taught)[0] == loss


def test_an_example_that_is_no_prompt_as_text_is_left_out(cache: TokenCache) -> None:
    longest = max(range(3), key=lambda n: teacher_length(cache[n]))
    packer = RowPacker(stream_of(cache), 400, TOKENIZERS.markers, teacher_tokens=teacher_length(cache[longest]) - 1)
    packer.next_row()
    assert packer.too_long > 0
    with pytest.raises(DatasetError, match="as text the decoder has room for 9"):
        RowPacker(stream_of(cache), 400, TOKENIZERS.markers, teacher_tokens=9).next_row()


def test_control_tokens_of_a_memory_are_text_to_the_teacher() -> None:
    example = tokenize_row(rows_of()[2], PROCESSOR, "here")
    assert TOKENIZERS.decoder.eos_token_id not in example.texts[0]
    assert TOKENIZERS.decoder.decode(example.texts[0]) == "stop <|end|>"


def run_values_with(run_values: Callable[..., dict[str, Any]], **stage: Any) -> dict[str, Any]:
    values = run_values()
    values["stages"] = [{**values["stages"][1], **stage}]
    return values


def test_a_run_with_a_teacher_tells_how_often_it_is_right(
    run_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    plain, taught = (run_values_with(run_values, teacher_weight=weight, ratios=2) for weight in (0.0, 0.5))
    lines = []
    for name, values in (("plain", plain), ("taught", taught)):
        values["output"] = str(tmp_path / name)
        assert Trainer(parse_config(values), device="cpu").run() == "done"
        lines.append(list(read_jsonl(tmp_path / name / "metrics.jsonl")))
    assert not {"teacher_loss", "teacher_right"} & lines[0][0].keys()
    assert all(0 <= line["teacher_right"] <= 1 and line["teacher_loss"] >= 0 for line in lines[1])
    # A random decoder is never right, so nothing was taught.
    assert [line["loss"] for line in lines[1]] == [line["loss"] for line in lines[0]]


def test_an_untouched_teacher_needs_a_decoder_that_is_kept(
    run_values: Callable[..., dict[str, Any]], run_config: Callable[..., TrainConfig], toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "chat.jsonl").write_bytes((toy_data / "copy_symbols.jsonl").read_bytes())
    values = run_values_with(run_values, teacher_weight=0.5)
    values["data"] = {"folder": str(folder)}
    Trainer(parse_config(values), device="cpu")
    values["decoder_tuning"] = {"method": "full"}
    with pytest.raises(ConfigError, match="task chat"):
        Trainer(parse_config(values), device="cpu")


def test_a_weight_that_cannot_be_is_an_error(run_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="teacher_weight: expected at least 0, got -1"):
        run_config(stages=[{"preset": "decoder", "steps": 1, "chunk_sizes": {1: 1}, "teacher_weight": -1}])
    with pytest.raises(ConfigError, match="align"):
        run_config(stages=[{"preset": "align", "steps": 1, "teacher_weight": 1}])
