"""Which examples come next, at which chunk sizes, and rows filled with them.

    stream = ExampleStream(caches, mixture, chunk_sizes, seed)         # which example comes next, at which chunk size
    packer = RowPacker(stream, row_tokens=2048, markers=markers)
    batch = packer.next_row()                                          # a PackedRow, ready for the model

Every draw is a function of the seed and of a cursor that a checkpoint stores as JSON: a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

from utils.errors import ConfigError, DatasetError
from utils.model.markers import MarkerIds
from utils.training.data.cache import TokenCache, TokenizedExample
from utils.training.expanded import draw_shown
from utils.training.plain import from_plain
from utils.training.rows import Draw, PackedRow, pack, packed_length
from utils.training.teaching import teacher_length

# Examples in a row that may be too long before the data are called unsuitable.
_MAX_TOO_LONG = 1000


@dataclass
class ExampleStream:
    """Draws tasks by weight, examples without repetition within an epoch, chunk sizes by weight, and what is text.

    Attributes:
        caches: Task → its examples.
        mixture: Task → weight.
        chunk_sizes: Chunk size → weight.
        seed: Of everything drawn.
        expanded: Share of the readings that show some of the memory as text, where the example has candidates for it.
        ratios: How many different chunk sizes each example is read at.
        cursor: Task → how many of its examples were drawn.
        drawn: Draws so far.
    """

    caches: Mapping[str, TokenCache]
    mixture: Mapping[str, float]
    chunk_sizes: Mapping[int, float]
    seed: str
    expanded: float = 0.0
    ratios: int = 1
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
        number = self._order(task, epoch)[place]
        # Each behind all before it, which are the same whatever the share, and however many readings there are.
        draw = Draw(task, number, chunk_size, self._shown(random, task, number, chunk_size))
        left = {size: weight for size, weight in self.chunk_sizes.items() if weight and size != chunk_size}
        also = []
        for _ in range(self.ratios - 1):
            size = random.choices(list(left), list(left.values()))[0]
            del left[size]
            also.append((size, self._shown(random, task, number, size)))
        return dataclasses.replace(draw, also=tuple(also))

    def _shown(self, random: Random, task: str, number: int, chunk_size: int) -> tuple[int, ...]:
        """What is text in a reading; mostly nothing."""
        if random.random() >= self.expanded:
            return ()
        return draw_shown(random, self.caches[task][number], chunk_size)

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
    waiting: tuple[str, int, int, tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]] | None
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
        teacher_tokens: Most rows of an example as a teacher reads it, with its memory as text; None: nobody teaches.
        too_long: Examples so far that fit into no row and were left out.
    """

    stream: ExampleStream
    row_tokens: int
    markers: MarkerIds
    memory_tokens: int | None = None
    length_discount: float = 0.0
    teacher_tokens: int | None = None
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
            beyond_teacher = self.teacher_tokens is not None and teacher_length(example) > self.teacher_tokens
            if self._exceeds(num_rows, num_memory) or beyond_teacher:
                self.too_long += 1
                failures += 1
                if failures == _MAX_TOO_LONG:
                    raise DatasetError(
                        f"{failures} examples in a row are longer than row_tokens {self.row_tokens} (memory_tokens "
                        f"{self.memory_tokens}{'; as text the decoder has room for ' if beyond_teacher else ''}"
                        f"{self.teacher_tokens if beyond_teacher else ''}), the last one with {num_rows} rows and "
                        f"{num_memory} memory tokens: raise these, or make shorter examples"
                    )
                continue
            if self._exceeds(rows + num_rows, memory + num_memory):
                self._waiting = draw
                return pack(chosen, self.markers, self.length_discount, taught=self.teacher_tokens is not None)
            chosen.append((draw, example))
            rows, memory = rows + num_rows, memory + num_memory

    def state(self) -> dict[str, Any]:
        """Where the packer and its stream stand, as JSON."""
        draw = self._waiting
        also = [[size, list(shown)] for size, shown in draw.also] if draw else []
        waiting = draw and [draw.task, draw.number, draw.chunk_size, list(draw.shown), also]
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
                and len(draw.readings) == self.stream.ratios
                and all(size in self.stream.chunk_sizes for size, _ in draw.readings)
                and {c for _, shown in draw.readings for c in shown}
                <= set(range(len(caches[draw.task][draw.number].candidates)))
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
