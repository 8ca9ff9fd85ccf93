"""Examples side by side in one row: no padding, positions that restart, labels that never cross an example.

    stream = ExampleStream(caches, mixture, chunk_sizes, seed)         # which example comes next, at which chunk size
    packer = RowPacker(stream, row_tokens=2048, markers=markers)
    batch = packer.next_row()                                          # a PackedRow, ready for the model

Every draw is a function of the seed and of a cursor that a checkpoint stores as JSON: a resumed run sees what an
uninterrupted one would have seen. Shape legend: T decoder rows of a packed row, n rows that carry a label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch

from utils.errors import ConfigError, DatasetError
from utils.model.markers import MarkerIds
from utils.model.packed_attention import Segments
from utils.model.prompt import MemorySpan
from utils.model.transfer import to_device
from utils.training.data.cache import TokenCache, TokenizedExample
from utils.training.expanded import draw_shown, layout, widen_example
from utils.training.plain import from_plain

# Examples in a row that may be too long before the data are called unsuitable.
_MAX_TOO_LONG = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One packed row of several examples.

    Attributes:
        input_ids: [T] long, placeholders widened to their latents, or to text where that is shown.
        position_ids: [T] long, from 0 in each example.
        lengths: Decoder rows of each example.
        label_rows: [n] long, rows whose next token is predicted.
        labels: [n] long, those next tokens.
        label_weights: [n] float32, what each counts in the loss.
        spans: All memory spans, with their places in the row; their tokens are arrays, int32.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    label_rows: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor
    spans: tuple[MemorySpan, ...]

    def to(self, device: torch.device) -> PackedRow:
        """The same row with its tensors on a device; what Python looks at stays on the host."""
        if self.input_ids.device == device:
            return self
        names = ("input_ids", "position_ids", "label_rows", "labels", "label_weights")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return dataclasses.replace(self, **moved)

    @property
    def segments(self) -> Segments:
        """The examples as sequences that do not see each other."""
        return Segments.of(self.lengths, causal=True)

    @property
    def num_labels(self) -> int:
        """Tokens that the loss is taken on."""
        return len(self.labels)

    @property
    def memory_tokens(self) -> int:
        """Encoder tokens of all spans."""
        return sum(len(span.token_ids) for span in self.spans)


@dataclass(frozen=True, slots=True)
class Draw:
    """An example of a task, the chunk size it is compressed with, and which of its candidates are text, ascending."""

    task: str
    number: int
    chunk_size: int
    shown: tuple[int, ...] = ()


@dataclass
class ExampleStream:
    """Draws tasks by weight, examples without repetition within an epoch, chunk sizes by weight, and what is text.

    Attributes:
        caches: Task → its examples.
        mixture: Task → weight.
        chunk_sizes: Chunk size → weight.
        seed: Of everything drawn.
        expanded: Share of the draws that show some of the memory as text, where the example has candidates for it.
        cursor: Task → how many of its examples were drawn.
        drawn: Draws so far.
    """

    caches: Mapping[str, TokenCache]
    mixture: Mapping[str, float]
    chunk_sizes: Mapping[int, float]
    seed: str
    expanded: float = 0.0
    cursor: dict[str, int] = field(default_factory=dict)
    drawn: int = 0
    _orders: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def next(self) -> Draw:
        """The next draw."""
        random = Random(f"{self.seed} draw {self.drawn}")
        self.drawn += 1
        weights: tuple[Mapping[Any, float], ...] = (self.mixture, self.chunk_sizes)
        task, chunk_size = (random.choices(list(w), list(w.values()))[0] for w in weights)
        position = self.cursor.get(task, 0)
        self.cursor[task] = position + 1
        epoch, place = divmod(position, len(self.caches[task]))
        draw = Draw(task, self._order(task, epoch)[place], chunk_size)
        # Behind all other draws, which are the same whatever the share.
        if random.random() >= self.expanded:
            return draw
        return dataclasses.replace(draw, shown=draw_shown(random, self.caches[task][draw.number], chunk_size))

    def _order(self, task: str, epoch: int) -> list[int]:
        if self._orders.get(task, (None, []))[0] != epoch:
            order = list(range(len(self.caches[task])))
            Random(f"{self.seed} {task} epoch {epoch}").shuffle(order)
            self._orders[task] = (epoch, order)
        return self._orders[task][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a packer stands, as `RowPacker.state` says it."""

    cursor: dict[str, int]
    drawn: int
    waiting: tuple[str, int, int, tuple[int, ...]] | None
    too_long: int

    def __post_init__(self) -> None:
        if not all(0 <= number < 1 << 53 for number in (self.drawn, self.too_long, *self.cursor.values())):
            raise ConfigError("the data cursor has a place that cannot be")


@dataclass
class RowPacker:
    """Fills rows from a stream.

    Attributes:
        stream: Where examples come from.
        row_tokens: Most decoder rows of a packed row.
        markers: Ids that are never a label.
        memory_tokens: Most encoder tokens of a packed row; no limit by default.
        length_discount: Each of an answer's n labels weighs n^-length_discount.
        too_long: Examples so far that fit into no row and were left out.
    """

    stream: ExampleStream
    row_tokens: int
    markers: MarkerIds
    memory_tokens: int | None = None
    length_discount: float = 0.0
    too_long: int = 0
    _waiting: Draw | None = None

    def next_row(self) -> PackedRow:
        """Fill one row; an example that does not fit any more opens the next one.

        Raises:
            DatasetError: Example after example is longer than a row.
        """
        chosen: list[tuple[Draw, TokenizedExample]] = []
        rows = memory = failures = 0
        while True:
            draw = self._waiting or self.stream.next()
            self._waiting = None
            example = self.stream.caches[draw.task][draw.number]
            num_rows, num_memory = packed_length(example, draw), sum(map(len, example.spans))
            if self._exceeds(num_rows, num_memory):
                self.too_long += 1
                failures += 1
                if failures == _MAX_TOO_LONG:
                    raise DatasetError(
                        f"{failures} examples in a row are longer than row_tokens {self.row_tokens} (memory_tokens "
                        f"{self.memory_tokens}), the last one with {num_rows} rows and {num_memory} memory tokens: "
                        "raise these, or make shorter examples"
                    )
                continue
            if self._exceeds(rows + num_rows, memory + num_memory):
                self._waiting = draw
                return pack(chosen, self.markers, self.length_discount)
            chosen.append((draw, example))
            rows, memory = rows + num_rows, memory + num_memory

    def state(self) -> dict[str, Any]:
        """Where the packer and its stream stand, as JSON."""
        draw = self._waiting
        waiting = draw and [draw.task, draw.number, draw.chunk_size, list(draw.shown)]
        return {
            "cursor": dict(self.stream.cursor),
            "drawn": self.stream.drawn,
            "waiting": waiting,
            "too_long": self.too_long,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`.

        Raises:
            ConfigError: It is no packer's.
            DatasetError: It is none of a packer over these data.
        """
        cursor: Cursor = from_plain(Cursor, state)
        caches, draw = self.stream.caches, cursor.waiting and Draw(*cursor.waiting)
        if not cursor.cursor.keys() <= caches.keys() or (
            draw is not None
            and not (
                draw.task in caches
                and 0 <= draw.number < len(caches[draw.task])
                and draw.chunk_size in self.stream.chunk_sizes
                and set(draw.shown) <= set(range(len(caches[draw.task][draw.number].candidates)))
            )
        ):
            raise DatasetError("the data cursor is of other data")
        self.stream.cursor, self.stream.drawn = cursor.cursor, cursor.drawn
        self._waiting, self.too_long = draw, cursor.too_long

    def _exceeds(self, rows: int, memory: int) -> bool:
        return rows > self.row_tokens or (self.memory_tokens is not None and memory > self.memory_tokens)


def packed_ahead(
    packer: RowPacker, pack_step: Callable[[], list[PackedRow]]
) -> Generator[tuple[list[PackedRow], dict[str, Any]]]:
    """The rows of one step after another, each packed by a thread while the device works on the one before.

    Args:
        packer: Where rows come from; not to be used by anybody else until the iterator is closed.
        pack_step: Makes the rows of one step from it.

    Yields:
        A step's rows, and where the packer stood behind these: not behind those that are made ahead.
    """

    def make() -> tuple[list[PackedRow], dict[str, Any]]:
        return pack_step(), packer.state()

    with ThreadPoolExecutor(1, thread_name_prefix="packing") as pool:
        waiting = pool.submit(make)
        while True:
            made = waiting.result()
            waiting = pool.submit(make)
            yield made


def packed_length(example: TokenizedExample, draw: Draw) -> int:
    """Decoder rows of an example as it is drawn."""
    return len(example.decoder_ids) + sum(rows - 1 for rows, _ in layout(example, draw.chunk_size, draw.shown))


def pack(
    chosen: Sequence[tuple[Draw, TokenizedExample]], markers: MarkerIds, length_discount: float = 0.0
) -> PackedRow:
    """Lay examples end to end, equal lengths side by side so that they share one attention call."""
    chosen = sorted(chosen, key=lambda item: packed_length(item[1], item[0]))
    ids: list[np.ndarray] = []
    label_rows: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    spans: list[MemorySpan] = []
    start = 0
    for draw, example in chosen:
        # The places of targets and spans move along.
        widened, begins, own = widen_example(example, draw.chunk_size, draw.shown, markers.memory, start)
        in_memory = np.zeros(len(widened), dtype=bool)
        for span in own:
            in_memory[span.start - start : span.stop - start] = True
        for first, stop in example.targets:
            wanted = np.arange(begins[first], begins[stop])
            wanted = wanted[~(in_memory[wanted] | np.isin(widened[wanted], (markers.start, markers.end)))]
            label_rows.append(start + wanted - 1)
            labels.append(widened[wanted])
            weights.append(np.full(len(wanted), max(1, len(wanted)) ** -length_discount))
        spans += own
        ids.append(widened)
        start += len(widened)
    return PackedRow(
        input_ids=_tensor(ids),
        position_ids=_tensor([np.arange(len(widened)) for widened in ids]),
        lengths=tuple(map(len, ids)),
        label_rows=_tensor(label_rows),
        labels=_tensor(labels),
        label_weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
        spans=tuple(spans),
    )


def _tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
