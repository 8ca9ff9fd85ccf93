"""What the teacher reads: an example with the plain text of its memory in place of markers and latents.

    row = pack([(draw, example)], markers, taught=True)
    row.teacher.lengths             # one sequence an example, at however many chunk sizes it is read

The teacher is the decoder itself, as far as it is trained, on the full text, without gradients. It is *right* on an
answer if at each of the answer's labels, given the right tokens before, the label is its most likely token: greedy
decoding would then give the answer, its end token included. Where it is not, it teaches nothing. On the task chat it is
the decoder without its LoRA, whose answers these are.

The text is tokenised by itself, so that labels have the same tokens in both rows; at its borders a tokenizer may have
cut otherwise. It costs a forward pass over as many rows as the memory has decoder tokens, besides the prompt's.
Source of the loss: KL to the decoder that reads the full text, arXiv 2510.20797.
Shape legend: S rows of the teacher, m of its labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.errors import ConfigError
from utils.model.markers import MarkerIds
from utils.model.packed_attention import Segments
from utils.model.transfer import to_device
from utils.training.config import TrainConfig
from utils.training.data.cache import TokenizedExample
from utils.training.data.tasks.chat import CHAT


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRow:
    """The examples of a packed row as the teacher reads them, end to end.

    Attributes:
        input_ids: [S] long.
        position_ids: [S] long, from 0 in each example.
        lengths: Rows of each example.
        label_rows: [m] long, rows whose next token is a label.
        labels: [m] long, those next tokens.
        answers: [m] long, the number of the answer that each label belongs to.
        num_answers: How many answers there are.
        is_trained: [S] bool, where the decoder reads as trained and not as it was before; None: everywhere.
        label_of: [n] long, for each label of the packed row the same label here.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    label_rows: torch.Tensor
    labels: torch.Tensor
    answers: torch.Tensor
    num_answers: int
    is_trained: torch.Tensor | None
    label_of: torch.Tensor

    def to(self, device: torch.device) -> TeacherRow:
        """The same row with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in tensors.items() if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def segments(self) -> Segments:
        """The examples as sequences that do not see each other."""
        return Segments.of(self.lengths, causal=True)


def check_teachers(config: TrainConfig, tasks: Iterable[str]) -> None:
    """Raise `ConfigError` where a stage's teacher is the decoder before training, and training leaves nothing of it.

    Args:
        config: The run.
        tasks: Of its data.
    """
    kept = config.decoder_tuning.method == "lora" or "decoder" not in config.trained_parts
    for number, stage in enumerate(config.stages):
        if stage.teacher_weight and not kept and CHAT in (stage.mixture or tasks):
            raise ConfigError(
                f"stages[{number}].teacher_weight: on the task {CHAT} the teacher is the decoder before its training, "
                "of which a full tuning leaves nothing: tune the decoder by LoRA, or leave the task out"
            )


def teacher_length(example: TokenizedExample) -> int:
    """Rows of an example with its memory as text."""
    return len(example.decoder_ids) - 3 * len(example.texts) + sum(map(len, example.texts))


def label_places(example: TokenizedExample, markers: MarkerIds) -> list[np.ndarray]:
    """For each answer the places of its labels among the example's ids; spans and markers in it are none."""
    plain = np.asarray(example.decoder_ids)
    is_label = ~np.isin(plain, (markers.start, markers.memory, markers.end))
    return [first + np.flatnonzero(is_label[first:stop]) for first, stop in example.targets]


def teacher_row(
    examples: Sequence[TokenizedExample],
    untouched: Sequence[bool],
    label_numbers: Sequence[tuple[int, int]],
    markers: MarkerIds,
) -> TeacherRow:
    """Lay examples with their memory as text end to end.

    Args:
        examples: The packed row's, each once.
        untouched: Which of them the decoder reads as it was before training.
        label_numbers: For each answer of the packed row, in the order of its labels: number of the example and of the
            answer in it.
        markers: Ids that are not shown.
    """
    order = sorted(range(len(examples)), key=lambda number: teacher_length(examples[number]))
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    label_rows: list[np.ndarray] = []
    places: dict[tuple[int, int], np.ndarray] = {}
    start = num_labels = 0
    for number in order:
        example = examples[number]
        own, begins = _as_text(example, markers)
        for answer, narrow in enumerate(label_places(example, markers)):
            label_rows.append(start + begins[narrow] - 1)
            labels.append(own[begins[narrow]])
            places[number, answer] = np.arange(num_labels, num_labels + len(narrow))
            num_labels += len(narrow)
        ids.append(own)
        start += len(own)
    is_trained = np.concatenate([np.full(len(own), not untouched[n]) for n, own in zip(order, ids, strict=True)])
    return TeacherRow(
        input_ids=joined(ids),
        position_ids=joined([np.arange(len(own)) for own in ids]),
        lengths=tuple(map(len, ids)),
        label_rows=joined(label_rows),
        labels=joined(labels),
        answers=joined([np.full(len(part), number) for number, part in enumerate(places.values())]),
        num_answers=len(places),
        is_trained=None if is_trained.all() else torch.from_numpy(is_trained),
        label_of=joined([places[place] for place in label_numbers]),
    )


def _as_text(example: TokenizedExample, markers: MarkerIds) -> tuple[np.ndarray, np.ndarray]:
    """Ids with the text of each span in place of its markers and placeholder; where each id begins in them [T + 1]."""
    plain = np.asarray(example.decoder_ids)
    at = np.flatnonzero(plain == markers.memory)
    sizes = np.where(np.isin(plain, (markers.start, markers.end)), 0, 1)
    sizes[at] = [len(text) for text in example.texts]
    begins = np.concatenate([[0], np.cumsum(sizes)])
    ids = np.repeat(plain, sizes)
    for begin, text in zip(begins[at], example.texts, strict=True):
        ids[begin : begin + len(text)] = text
    return ids, begins


def joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """Arrays end to end, as one tensor of whole numbers."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
