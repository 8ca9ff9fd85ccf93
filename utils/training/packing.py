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

from utils.errors import DatasetError
from utils.model.markers import MarkerIds
from utils.model.packed_attention import Segments
from utils.model.prompt import MemorySpan, num_latents, widen
from utils.model.transfer import to_device
from utils.training.data.cache import TokenCache, TokenizedExample

# Examples in a row that may be too long before the data are called unsuitable.
_MAX_TOO_LONG = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One packed row of several examples.

    Attributes:
        input_ids: [T] long, placeholders widened to their latents.
        position_ids: [T] long, from 0 in each example.
        lengths: Decoder rows of each example.
        label_rows: [n] long, rows whose next token is predicted.
        labels: [n] long, those next tokens.
        label_weights: [n] float32, what each counts in the loss.
        spans: All memory spans, with their places in the row; their tokens are arrays, int32.
        tasks: Task of each example.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    label_rows: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor
    spans: tuple[MemorySpan, ...]
    tasks: tuple[str, ...] = ()

    def to(self, device: torch.device) -> PackedRow:
        """The same row with its tensors on a device; what Python looks at stays on the host."""
        if self.input_ids.device == device:
            return self
        names = [x.name for x in dataclasses.fields(self) if isinstance(getattr(self, x.name), torch.Tensor)]
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
    """An example of a task and the chunk size it is compressed with."""

    task: str
    number: int
    chunk_size: int


@dataclass
class ExampleStream:
    """Draws tasks by weight, examples without repetition within an epoch, chunk sizes by weight.

    Attributes:
        caches: Task → its examples.
        mixture: Task → weight.
        chunk_sizes: Chunk size → weight.
        seed: Of everything drawn.
    """

    caches: Mapping[str, TokenCache]
    mixture: Mapping[str, float]
    chunk_sizes: Mapping[int, float]
    seed: str
    _cursor: dict[str, int] = field(default_factory=dict)
    _drawn: int = 0
    _orders: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def next(self) -> Draw:
        """The next draw."""
        random = Random(f"{self.seed} draw {self._drawn}")
        self._drawn += 1
        task = _choose(random, self.mixture)
        chunk_size = _choose(random, self.chunk_sizes)
        position = self._cursor.get(task, 0)
        self._cursor[task] = position + 1
        epoch, place = divmod(position, len(self.caches[task]))
        return Draw(task, self._order(task, epoch)[place], chunk_size)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {"cursor": dict(self._cursor), "drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`.

        Raises:
            DatasetError: It is none of a stream over these tasks.
        """
        cursor, drawn = state.get("cursor"), state.get("drawn")
        if not isinstance(cursor, dict) or not cursor.keys() <= self.caches.keys():
            raise DatasetError("the data cursor is of other tasks")
        if not all(_is_count(number) for number in (drawn, *cursor.values())):
            raise DatasetError("the data cursor has a place that cannot be")
        self._cursor, self._drawn = dict(cursor), drawn  # type: ignore[assignment]

    def has(self, task: Any, number: Any, chunk_size: Any) -> bool:
        """Whether this is a draw that the stream could give."""
        cache = self.caches.get(task) if isinstance(task, str) else None
        chosen = type(chunk_size) is int and chunk_size in self.chunk_sizes
        return cache is not None and chosen and _is_count(number) and number < len(cache)

    def _order(self, task: str, epoch: int) -> list[int]:
        known = self._orders.get(task)
        if known is None or known[0] != epoch:
            order = list(range(len(self.caches[task])))
            Random(f"{self.seed} {task} epoch {epoch}").shuffle(order)
            known = self._orders[task] = (epoch, order)
        return known[1]


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
            num_rows, num_memory = packed_length(example, draw.chunk_size), sum(map(len, example.spans))
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
        """Where the packer stands, as JSON."""
        waiting = self._waiting and [self._waiting.task, self._waiting.number, self._waiting.chunk_size]
        return {**self.stream.state(), "waiting": waiting, "too_long": self.too_long}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`.

        Raises:
            DatasetError: It is none of a packer over these data.
        """
        self.stream.restore(state)
        waiting, too_long = state.get("waiting"), state.get("too_long")
        if waiting is not None:
            if not isinstance(waiting, list) or len(waiting) != 3 or not self.stream.has(*waiting):
                raise DatasetError("the example that waits for the next row is none of these data")
            self._waiting = Draw(*waiting)
        if not _is_count(too_long):
            raise DatasetError("the number of examples that were left out is none")
        self.too_long = too_long  # type: ignore[assignment]

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


def packed_length(example: TokenizedExample, chunk_size: int) -> int:
    """Decoder rows of an example at a chunk size."""
    return len(example.decoder_ids) + sum(num_latents(len(span), chunk_size) - 1 for span in example.spans)


def pack(
    chosen: Sequence[tuple[Draw, TokenizedExample]], markers: MarkerIds, length_discount: float = 0.0
) -> PackedRow:
    """Lay examples end to end, equal lengths side by side so that they share one attention call."""
    chosen = sorted(chosen, key=lambda item: packed_length(item[1], item[0].chunk_size))
    ids: list[np.ndarray] = []
    label_rows: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    spans: list[MemorySpan] = []
    lengths: list[int] = []
    start = 0
    for draw, example in chosen:
        widened, targets, places = _widen(example, draw.chunk_size, markers.memory)
        for first, stop in targets:
            wanted = np.arange(first, stop)
            wanted = wanted[~np.isin(widened[wanted], (markers.start, markers.end, markers.memory))]
            label_rows.append(start + wanted - 1)
            labels.append(widened[wanted])
            weights.append(np.full(len(wanted), max(1, len(wanted)) ** -length_discount))
        spans += [
            # Read here: the file behind the tokens is not looked at again.
            MemorySpan(text="", token_ids=np.array(tokens), start=start + a, stop=start + b, chunk_size=draw.chunk_size)
            for tokens, (a, b) in zip(example.spans, places, strict=True)
        ]
        ids.append(widened)
        lengths.append(len(widened))
        start += len(widened)
    return PackedRow(
        input_ids=_tensor(ids),
        position_ids=_tensor([np.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        label_rows=_tensor(label_rows),
        labels=_tensor(labels),
        label_weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
        spans=tuple(spans),
        tasks=tuple(draw.task for draw, _ in chosen),
    )


def _widen(example: TokenizedExample, chunk_size: int, placeholder: int) -> tuple[np.ndarray, list[Any], list[Any]]:
    """The example's ids with its spans' latents; the places of targets and spans move along."""
    ids = np.asarray(example.decoder_ids)
    widened, begins = widen(ids, [num_latents(len(span), chunk_size) for span in example.spans], placeholder)
    targets = [(int(begins[first]), int(begins[stop])) for first, stop in example.targets]
    return widened, targets, [(int(begins[at]), int(begins[at + 1])) for at in np.flatnonzero(ids == placeholder)]


def _tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _choose(random: Random, weights: Mapping[Any, float]) -> Any:
    return random.choices(list(weights), weights=list(weights.values()))[0]
