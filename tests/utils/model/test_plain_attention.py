"""The plain attention of bfloat16 training on the CPU computes what torch's fused one does."""

from __future__ import annotations

import pytest
import torch

from utils.model.packed_attention import Segments, packed_attention_forward


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
