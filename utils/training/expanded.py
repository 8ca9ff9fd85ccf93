"""Examples with text beside latents: what is drawn to be text, and the rows that it makes.

    shown = draw_shown(random, example, chunk_size=8)                  # the numbers of some of its candidates
    ids, begins, spans = widen_example(example, 8, shown, placeholder)

The rows are those that `utils.model.expand` gives a prompt in which the same lines are chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from utils.model.expand import inner_chunks
from utils.model.prompt import MemorySpan, TextSegment, num_latents, widen
from utils.training.data.cache import TokenizedExample

_MOST_SEGMENTS = 3


class ShownText(NamedTuple):
    """A candidate as text: its decoder ids, their first row in the span, and the chunks that they stand for."""

    ids: np.ndarray
    row: int
    chunks: tuple[int, int]


def draw_shown(random: Random, example: TokenizedExample, chunk_size: int) -> tuple[int, ...]:
    """Which of an example's candidates are text, ascending; none where it has none.

    In half of the examples that have such it is what the selector chooses, as in use. In the others it is one to three
    segments: the lines that hold the answer among them in half of those, as where a selector is right; else by chance,
    so that nobody learns to look at the text alone.
    """
    number = random.randint(1, _MOST_SEGMENTS)
    places = range(len(example.candidates))
    selected = [c for c in places if example.candidates[c].selected]
    holding = [c for c in places if example.candidates[c].holds_answer]
    others = [c for c in places if not (example.candidates[c].holds_answer or example.candidates[c].selected)]
    random.shuffle(others)
    with_answer, by_selector = random.random() < 0.5, random.random() < 0.5
    if by_selector and selected:
        number, wanted = len(selected), selected
    else:
        wanted = (holding if with_answer else []) + others
    shown: list[int] = []
    for candidate in wanted:
        wider = sorted([*shown, candidate])
        if len(shown) < number and _are_apart(example, chunk_size, wider):
            shown = wider
    return tuple(shown)


def layout(example: TokenizedExample, chunk_size: int, shown: Sequence[int] = ()) -> list[tuple[int, list[ShownText]]]:
    """For each span how many rows it has, and what is text in them."""
    spans = []
    for number, tokens in enumerate(example.spans):
        moved, texts = 0, []  # rows that text has added so far, less those of the latents it stands for
        for candidate in (example.candidates[c] for c in shown):
            if candidate.span == number:
                chunks = inner_chunks(candidate.tokens, len(tokens), chunk_size)
                texts.append(ShownText(candidate.ids, chunks[0] + moved, chunks))
                moved += len(candidate.ids) - (chunks[1] - chunks[0])
        spans.append((num_latents(len(tokens), chunk_size) + moved, texts))
    return spans


def widen_example(
    example: TokenizedExample, chunk_size: int, shown: Sequence[int], placeholder: int, start: int = 0
) -> tuple[np.ndarray, np.ndarray, list[MemorySpan]]:
    """An example with rows for latents and text in each placeholder's place.

    Args:
        example: As tokenised.
        chunk_size: Encoder tokens per latent.
        shown: Which of its candidates are text, ascending.
        placeholder: Id of the rows of latents.
        start: The example's first row in its packed row.

    Returns:
        Its ids, where each of the narrow ids begins in them [T + 1], and its spans with their places in the packed row.
    """
    plain = np.asarray(example.decoder_ids)
    planned = layout(example, chunk_size, shown)
    ids, begins = widen(plain, [rows for rows, _ in planned], placeholder)
    spans = []
    for tokens, at, (rows, texts) in zip(example.spans, np.flatnonzero(plain == placeholder), planned, strict=True):
        first, segments = int(begins[at]), []
        for text in texts:
            begin, stop = first + text.row, first + text.row + len(text.ids)
            ids[begin:stop] = text.ids
            segments.append(TextSegment(chars=(), rows=(start + begin, start + stop), chunks=text.chunks))
        place = {"start": start + first, "stop": start + first + rows}
        # Read here: the file behind the tokens is not looked at again.
        own = np.array(tokens)
        spans.append(MemorySpan(text="", token_ids=own, chunk_size=chunk_size, segments=tuple(segments), **place))
    return ids, begins, spans


def _are_apart(example: TokenizedExample, chunk_size: int, shown: Sequence[int]) -> bool:
    """Whether there is a latent between any two: text side by side would be tokenised as one."""
    pairs = (itertools.pairwise(texts) for _, texts in layout(example, chunk_size, shown))
    return all(before.chunks[1] < after.chunks[0] for before, after in itertools.chain.from_iterable(pairs))
