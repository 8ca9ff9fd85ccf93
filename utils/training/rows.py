"""A packed row: examples side by side, no padding, positions that restart, labels that never cross an example.

    row = pack([(Draw("lookup", 7, 4), caches["lookup"][7])], markers)

An example may be read at several chunk sizes: it is encoded once, and each reading is a sequence of its own in the row.
Shape legend: T decoder rows of a packed row, n rows that carry a label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.model.markers import MarkerIds
from utils.model.packed_attention import Segments
from utils.model.prompt import MemorySpan
from utils.model.transfer import to_device
from utils.training.data.cache import TokenizedExample
from utils.training.data.tasks.chat import CHAT
from utils.training.expanded import layout, widen_example
from utils.training.teaching import TeacherRow, joined, label_places, teacher_row


@dataclass(frozen=True, slots=True)
class Draw:
    """An example of a task, and how it is read.

    Attributes:
        task: The task.
        number: Of the example.
        chunk_size: What it is compressed with.
        shown: Which of its candidates are text, ascending.
        also: Further readings of the same encoding: a chunk size, and which candidates are text in it.
    """

    task: str
    number: int
    chunk_size: int
    shown: tuple[int, ...] = ()
    also: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def readings(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Chunk size and what is text, for each of the sequences that it becomes."""
        return ((self.chunk_size, self.shown), *self.also)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One packed row of several examples.

    Attributes:
        input_ids: [T] long, placeholders widened to their latents, or to text where that is shown.
        position_ids: [T] long, from 0 in each example.
        lengths: Decoder rows of each example, or of each of its readings.
        label_rows: [n] long, rows whose next token is predicted.
        labels: [n] long, those next tokens.
        label_weights: [n] float32, what each counts in the loss.
        spans: All memory spans, with their places in the row; their tokens are arrays, int32.
        shared: Numbers of spans that are one memory at several chunk sizes, to be encoded once; empty where each span
            has an encoding of its own.
        teacher: The same examples with their memory as text; None where nobody teaches.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    label_rows: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor
    spans: tuple[MemorySpan, ...]
    shared: tuple[tuple[int, ...], ...] = ()
    teacher: TeacherRow | None = None

    def to(self, device: torch.device) -> PackedRow:
        """The same row with its tensors on a device; what Python looks at stays on the host."""
        if self.input_ids.device == device:
            return self
        names = ("input_ids", "position_ids", "label_rows", "labels", "label_weights")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        moved["teacher"] = self.teacher and self.teacher.to(device)
        return dataclasses.replace(self, **moved)

    @property
    def segments(self) -> Segments:
        """The readings of examples as sequences that do not see each other."""
        return Segments.of(self.lengths, causal=True)

    @property
    def num_labels(self) -> int:
        """Tokens that the loss is taken on."""
        return len(self.labels)

    @property
    def encoded(self) -> list[MemorySpan]:
        """The spans that the encoder reads: of those that share an encoding the first."""
        later = {number for group in self.shared for number in group[1:]}
        return [span for number, span in enumerate(self.spans) if number not in later]

    @property
    def memory_tokens(self) -> int:
        """Encoder tokens of all encodings."""
        return sum(len(span.token_ids) for span in self.encoded)


def packed_length(example: TokenizedExample, draw: Draw) -> int:
    """Decoder rows of an example as it is drawn, in all its readings."""
    return sum(_reading_length(example, *reading) for reading in draw.readings)


def _reading_length(example: TokenizedExample, chunk_size: int, shown: tuple[int, ...]) -> int:
    return len(example.decoder_ids) + sum(rows - 1 for rows, _ in layout(example, chunk_size, shown))


def pack(
    chosen: Sequence[tuple[Draw, TokenizedExample]],
    markers: MarkerIds,
    length_discount: float = 0.0,
    *,
    taught: bool = False,
) -> PackedRow:
    """Lay examples end to end, equal lengths side by side so that they share one attention call.

    Args:
        chosen: The examples, and how each is read.
        markers: Ids that are never a label.
        length_discount: Each of an answer's n labels weighs n^-length_discount.
        taught: Whether a teacher reads them as well.
    """
    readings = [
        (_reading_length(e, *reading), place, reading) for place, (d, e) in enumerate(chosen) for reading in d.readings
    ]
    readings.sort(key=lambda item: item[0])
    ids: list[np.ndarray] = []
    label_rows: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    answers: list[tuple[int, int]] = []
    spans: list[MemorySpan] = []
    spans_of: list[list[range]] = [[] for _ in chosen]
    start = 0
    for _, place, (chunk_size, shown) in readings:
        example = chosen[place][1]
        # The places of targets and spans move along.
        widened, begins, own = widen_example(example, chunk_size, shown, markers.memory, start)
        for answer, narrow in enumerate(label_places(example, markers)):
            wanted = begins[narrow]
            answers.append((place, answer))
            label_rows.append(start + wanted - 1)
            labels.append(widened[wanted])
            weights.append(np.full(len(wanted), max(1, len(wanted)) ** -length_discount))
        spans_of[place].append(range(len(spans), len(spans) + len(own)))
        spans += own
        ids.append(widened)
        start += len(widened)
    return PackedRow(
        input_ids=joined(ids),
        position_ids=joined([np.arange(len(widened)) for widened in ids]),
        lengths=tuple(map(len, ids)),
        label_rows=joined(label_rows),
        labels=joined(labels),
        label_weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
        spans=tuple(spans),
        shared=tuple(_shared(spans_of)) if any(len(own) > 1 for own in spans_of) else (),
        teacher=teacher_row([e for _, e in chosen], [d.task == CHAT for d, _ in chosen], answers, markers)
        if taught
        else None,
    )


def _shared(spans_of: Sequence[Sequence[range]]) -> Iterator[tuple[int, ...]]:
    """For each example's memory spans their numbers in all its readings."""
    for readings in spans_of:
        yield from zip(*readings, strict=True)
