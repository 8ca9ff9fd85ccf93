"""Splicing: each latent lands in its row, everything else stays, and nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import SpliceError
from utils.model.splice import splice_latents

WIDTH = 3


@st.composite
def layouts(draw: Any) -> tuple[int, list[tuple[int, int]]]:
    """Rows in all, and ascending spans, often adjacent."""
    spans, at = [], 0
    for _ in range(draw(st.integers(0, 5))):
        start = at + draw(st.integers(0, 3))
        at = start + draw(st.integers(1, 4))
        spans.append((start, at))
    return at + draw(st.integers(0, 3)), spans


@given(layouts())
def test_rows_are_latents_inside_spans_and_embeddings_outside(layout: tuple[int, list[tuple[int, int]]]) -> None:
    num_rows, spans = layout
    embeds = torch.arange(num_rows * WIDTH, dtype=torch.float32).reshape(num_rows, WIDTH)
    before = embeds.clone()
    latents = [-torch.ones(stop - start, WIDTH) * (i + 1) for i, (start, stop) in enumerate(spans)]
    result = splice_latents(embeds, latents, spans)
    assert result.shape == embeds.shape
    assert torch.equal(embeds, before)
    for row in range(num_rows):
        owner = next((i for i, (start, stop) in enumerate(spans) if start <= row < stop), None)
        expected = embeds[row] if owner is None else torch.full((WIDTH,), -(owner + 1.0))
        assert torch.equal(result[row], expected)


def test_dtype_is_that_of_the_embeddings_and_gradients_flow() -> None:
    embeds = torch.zeros(4, WIDTH, dtype=torch.float64, requires_grad=True)
    latents = torch.ones(2, WIDTH, requires_grad=True)
    result = splice_latents(embeds, [latents], [(1, 3)])
    assert result.dtype == torch.float64
    result.sum().backward()
    assert embeds.grad is not None
    assert latents.grad is not None
    assert embeds.grad.sum(dim=1).tolist() == [3, 0, 0, 3]
    assert latents.grad.sum() == 2 * WIDTH


@pytest.mark.parametrize(
    ("shapes", "spans", "reason"),
    [
        ([(2, WIDTH)], [], "0 spans but latents for 1"),
        ([], [(0, 1)], "1 spans but latents for 0"),
        ([(2, WIDTH)], [(0, 3)], "span 0 has 3 placeholders but 2 latents"),
        ([(2, WIDTH + 1)], [(0, 2)], "width 3, got shape"),
        ([(WIDTH,)], [(0, 1)], "width 3, got shape"),
        ([(2, WIDTH)], [(4, 6)], "rows between 0 and 5"),
        ([(0, WIDTH)], [(2, 2)], "span 0 is"),
        ([(1, WIDTH)], [(-1, 0)], "span 0 is"),
        ([(2, WIDTH), (2, WIDTH)], [(0, 2), (1, 3)], "span 1 is .* between 2 and 5"),
        ([(1, WIDTH), (1, WIDTH)], [(3, 4), (0, 1)], "ascending"),
    ],
)
def test_disagreement_is_an_error(shapes: Any, spans: Any, reason: str) -> None:
    with pytest.raises(SpliceError, match=reason):
        splice_latents(torch.zeros(5, WIDTH), [torch.zeros(shape) for shape in shapes], spans)
