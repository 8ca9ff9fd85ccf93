"""The plain attention of bfloat16 training on the CPU computes what torch's fused one does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from utils.model.packed_attention import Segments, _plain_attention, packed_attention_forward


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_with_and_without_gradient_agree(causal: bool, sliding_window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 17, 8, generator=generator).bfloat16() for h in (6, 2, 2))
    segments = Segments.of([5, 5, 1, 6], causal=causal)
    arguments = {"segments": segments, "sliding_window": sliding_window}
    module = torch.nn.Module()
    fused, _ = packed_attention_forward(module, query, key, value, None, **arguments)
    plain, _ = packed_attention_forward(module, query.requires_grad_(), key, value, None, **arguments)
    torch.testing.assert_close(plain.detach(), fused, rtol=0.02, atol=0.02)
    plain.sum().backward()
    exact, _ = packed_attention_forward(
        module, query.detach().float().requires_grad_(), key.float(), value.float(), None, **arguments
    )
    torch.testing.assert_close(plain.detach().float(), exact.detach(), rtol=0.02, atol=0.02)
    assert query.grad is not None
    assert bool(torch.isfinite(query.grad).all())


@pytest.mark.parametrize("masked", ["causal", "window", "nothing"])
def test_its_gradient_is_autograd_s(masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(2, heads, 11, 8, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(heads).requires_grad_() for heads in (6, 3, 3)]
    offsets = torch.arange(11)
    window = (offsets[:, None] - offsets).abs() < 4 if masked == "window" else None
    arguments = {
        "attn_mask": window,
        "is_causal": masked == "causal",
        "scale": 0.3,
        "enable_gqa": True,
        "dropout_p": 0.0,
    }
    found = _plain_attention(*inputs, **arguments)
    wanted = F.scaled_dot_product_attention(*inputs, **arguments)
    torch.testing.assert_close(found, wanted)
    upstream = draw(6)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
