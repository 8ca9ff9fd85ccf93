"""Packed attention run by run, in one variable-length call and by flex attention: all the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support.fake_cuda import fake_cuda
from tests.support.marks import requires_gpu
from utils.model import packed_attention
from utils.model.packed_attention import Segments, packed_attention_forward

LENGTHS = (1, 5, 5, 17, 33, 33, 64)
WIDTH = 16


def tensors(groups: int, **settings: Any) -> list[torch.Tensor]:
    """Query, key and value of a packed row: four query heads, `groups` key/value heads."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(LENGTHS), WIDTH).to(**settings) for heads in (4, groups, groups)]


def sequence_by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch 2.15 documents of `varlen_attn`, plainly: [T, h, K] in, [T, h, K] out."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == max(LENGTHS)
    left, right = window_size
    outs = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        at = torch.arange(stop - start)
        ahead = at[None] - at[:, None]
        seen = (ahead >= -left if left >= 0 else ahead == ahead) & (ahead <= right if right >= 0 else ahead == ahead)
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def as_before_2_15(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same of torch 2.11 to 2.14: it finds out by itself that heads are shared."""
    settings: dict[str, Any] = {"scale": scale, "window_size": window_size}
    grouped = query.shape[1] != key.shape[1]
    return sequence_by_sequence(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=grouped, **settings)


@pytest.mark.parametrize("kernel", [sequence_by_sequence, as_before_2_15])
@pytest.mark.parametrize("sliding_window", [None, 8])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
def test_one_call_computes_what_the_runs_do(
    monkeypatch: pytest.MonkeyPatch, groups: int, causal: bool, sliding_window: int | None, kernel: Any
) -> None:
    segments = Segments.of(LENGTHS, causal=causal)
    qkv = tensors(groups)

    def attend() -> torch.Tensor:
        settings = {"scaling": 0.2, "segments": segments, "sliding_window": sliding_window}
        return packed_attention_forward(torch.nn.Identity(), *qkv, None, **settings)[0]

    expected = attend()
    monkeypatch.setattr(packed_attention, "varlen_kernel", lambda query: kernel)
    torch.testing.assert_close(attend(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [4, 2])
def test_it_calls_the_installed_torch_as_that_wants_it(groups: int) -> None:
    """On a device without values, through the real function: an argument that this torch does not know is an error."""
    query, key, value = tensors(groups, dtype=torch.bfloat16)
    with fake_cuda(torch.nn.Identity()) as record:
        moved = [x.to("cuda", non_blocking=True) for x in (query, key, value)]
        segments = Segments.of(LENGTHS, causal=True)
        out, _ = packed_attention_forward(torch.nn.Identity(), *moved, None, segments=segments)
    assert out.shape == (1, sum(LENGTHS), 4, WIDTH)
    assert sum("varlen_attn" in name for name in record.operations) == 1
    assert record.waits == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sliding_window", [None, 8])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_attention_with_a_document_mask_agrees(groups: int, causal: bool, sliding_window: int | None) -> None:
    """Torch's flex attention knows nothing of runs: each pair of tokens is asked about by itself."""
    query, key, value = tensors(groups)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))

    def seen(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        near = document[q] == document[k]
        near = near & (q >= k) if causal else near
        return near if sliding_window is None else near & ((q - k).abs() < sliding_window)

    mask = create_block_mask(seen, B=None, H=None, Q_LEN=len(document), KV_LEN=len(document), device="cpu")
    expected = flex_attention(query, key, value, block_mask=mask, scale=0.2, enable_gqa=groups != 4)
    segments = Segments.of(LENGTHS, causal=causal)
    settings = {"scaling": 0.2, "segments": segments, "sliding_window": sliding_window}
    got, _ = packed_attention_forward(torch.nn.Identity(), query, key, value, None, **settings)
    torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_it_serves_no_cpu_tensors() -> None:
    assert packed_attention.varlen_kernel(tensors(2, dtype=torch.bfloat16)[0]) is None


@requires_gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_flash_kernel_agrees_with_the_runs_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, groups: int, causal: bool
) -> None:
    segments = Segments.of(LENGTHS, causal=causal)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        qkv = [x.requires_grad_() for x in tensors(groups, device="cuda", dtype=dtype)]
        out, _ = packed_attention_forward(torch.nn.Identity(), *qkv, None, segments=segments)
        return [out, *torch.autograd.grad(out.float().square().sum(), qkv)]

    assert packed_attention.varlen_kernel(tensors(groups, device="cuda", dtype=torch.bfloat16)[0]) is not None
    fast = run(torch.bfloat16)
    monkeypatch.setattr(packed_attention, "varlen_kernel", lambda query: None)
    for got, expected in zip(fast, run(torch.float32), strict=True):
        torch.testing.assert_close(got.float(), expected, atol=3e-2, rtol=3e-2)
