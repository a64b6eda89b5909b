"""Blocks of keys, merged, against attention over all keys at once."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_hbp.model import blocks, kernels
from megatron_hbp.model.split import Segments

CPU = torch.device("cpu")


def tensors(n, m, *, kv_heads=2, widths=(8, 5), dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = torch.randn(n, 6, widths[0]), torch.randn(m, kv_heads, widths[0]), torch.randn(m, kv_heads, widths[1])
    return [x.to(dtype) for x in (q, k, v)]


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("widths", [(8, 5), (5, 8), (8, 8)])
@pytest.mark.parametrize("cuts", [(0, 4, 9), (0, 9), (0, 1, 2, 9)])
def test_blocks_of_one_sample_add_up(kv_heads, widths, cuts):
    """Queries are the last 5 of 14 tokens: earlier keys in blocks, seen whole, then their own, causal."""
    q, k, v = (x.requires_grad_() for x in tensors(5, 14, kv_heads=kv_heads, widths=widths))
    expected = kernels.reference(q, k, v, Segments.of([0, 5], [0, 14], device=CPU), 0.37)
    towards = torch.randn_like(expected)
    yard = torch.autograd.grad(expected, (q, k, v), towards)

    with torch.no_grad():
        parts = [(slice(a, b), False) for a, b in pairwise(cuts)] + [(slice(9, 14), True)]
        out, lse = blocks.nothing_seen(q, widths[1])
        for at, causal in parts:
            blocks.merge(out, lse, *blocks.block_forward(q, k[at], v[at], causal, 0.37, "reference"))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at, causal in parts:
            of_block = blocks.block_backward(towards, q, k[at], v[at], out, lse, causal, 0.37, "reference")
            dq += of_block[0]
            dk[at], dv[at] = of_block[1:]
    for mine, theirs in zip((dq, dk, dv), yard, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(12, 12), (5, 5)])
def test_the_block_of_a_whole_pack_is_the_kernel(shape):
    segments = Segments.of([0, 3, 4, 12], device=CPU)
    q, k, v = (x.requires_grad_() for x in tensors(12, 12, widths=shape))
    expected = kernels.reference(q, k, v, segments, 0.5)
    towards = torch.randn_like(expected)
    yard = torch.autograd.grad(expected, (q, k, v), towards)
    with torch.no_grad():
        out, lse = blocks.block_forward(q, k, v, True, 0.5, "reference", segments)
        grads = blocks.block_backward(towards, q, k, v, out, lse, True, 0.5, "reference", segments)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    for mine, theirs in zip(grads, yard, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_a_query_without_keys_is_nothing_and_stays_nothing():
    q, k, v = tensors(3, 1)
    out, lse = blocks.block_forward(q, k, v, True, 0.5, "reference")  # only the last query sees the key
    assert (lse[:, :2] == -math.inf).all() and (out[:2] == 0).all() and lse[:, 2].isfinite().all()
    total, total_lse = blocks.nothing_seen(q, 5)
    blocks.merge(total, total_lse, out, lse)
    blocks.merge(total, total_lse, *blocks.block_forward(q, k[:0], v[:0], False, 0.5, "reference"))
    assert torch.equal(total, out) and torch.equal(total_lse, lse)
    for grad in blocks.block_backward(torch.ones_like(out), q, k, v, total, total_lse, True, 0.5, "reference"):
        assert grad.isfinite().all()


def test_huge_scores_merge():
    """Scores of 1e5 overflow exp in any dtype; the larger block takes all."""
    out, lse = torch.zeros(1, 1, 1), torch.full((1, 1), 1e5)
    blocks.merge(out, lse, torch.ones(1, 1, 1), torch.full((1, 1), 2e5))
    assert out.item() == 1 and lse.item() == 2e5


def test_half_precision_accumulates_in_single():
    q, k, v = tensors(64, 64, dtype=torch.bfloat16)
    exact = kernels.reference(q.double(), k.double(), v.double(), Segments.of([0, 64], device=CPU), 0.3)
    out, lse = blocks.nothing_seen(q, 5)
    assert out.dtype == lse.dtype == torch.float32
    for at in range(0, 64, 16):
        rows = slice(at, 64)
        part = blocks.block_forward(q[rows], k[at : at + 16], v[at : at + 16], False, 0.3, "reference")
        own = blocks.block_forward(q[at : at + 16], k[at : at + 16], v[at : at + 16], True, 0.3, "reference")
        assert part[0].dtype == torch.bfloat16 and part[1].dtype == torch.float32
        blocks.merge(out[at : at + 16], lse[:, at : at + 16], *own)
        blocks.merge(out[at + 16 :], lse[:, at + 16 :], part[0][16:], part[1][:, 16:])
    assert (out - exact).abs().max() < 2**-8 * exact.abs().max()


def test_a_kernel_has_a_name():
    assert blocks.name_of(kernels.reference) == "reference" and blocks.name_of(kernels.varlen) == "varlen"


# what FlashAttention wants and says (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp), in plain torch


def _flash_checks(q, k, v, *same_as_q):
    width = q.shape[2]
    assert width % 8 == 0 and k.shape[1:] == v.shape[1:] and k.shape[2] == width
    assert all(x.shape == q.shape for x in same_as_q)
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype == torch.bfloat16 for x in (q, k, v, *same_as_q))


def _flash_segments(cu_q, cu_k, max_q, max_k, causal, window):
    assert window == (-1, 0 if causal else -1) and cu_q.dtype == cu_k.dtype == torch.int32
    segments = Segments.of(cu_q.tolist(), cu_k.tolist(), device=CPU)
    assert (segments.max_q, segments.max_k) == (max_q, max_k)
    return segments


def _flash_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right
):  # fmt: skip
    _flash_checks(q, k, v)
    segments = _flash_segments(cu_q, cu_k, max_q, max_k, causal, (window_size_left, window_size_right))
    out, lse = blocks.block_forward(q, k, v, causal, scale, "reference", segments)
    return out, lse.masked_fill(lse == -math.inf, math.inf), None, None, None


def _flash_backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    _flash_checks(q, k, v, grad, out)
    assert lse.is_contiguous() and lse.dtype == torch.float32 and lse.shape == (q.shape[1], q.shape[0])
    segments = _flash_segments(cu_q, cu_k, max_q, max_k, causal, (window_size_left, window_size_right))
    assert not (lse == -math.inf).any()
    return blocks.block_backward(grad, q, k, v, out, lse, causal, scale, "reference", segments)


@pytest.mark.parametrize("widths", [(8, 8), (12, 8), (8, 12)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [None, Segments.of([0, 3, 5], [0, 1, 7], device=CPU)])
def test_varlen_asks_flash_attention_for_what_the_reference_does(monkeypatch, widths, causal, segments):
    """No GPU: with a stand-in that has FlashAttention's checks and conventions. Two queries of three see no key."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", _flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", _flash_backward)
    q, k, v = tensors(5, 7, widths=widths, dtype=torch.bfloat16)
    out, lse = blocks.block_forward(q, k, v, causal, 0.3, "varlen", segments)
    expected = blocks.block_forward(q, k, v, causal, 0.3, "reference", segments)
    assert torch.equal(lse, expected[1])
    torch.testing.assert_close(out, expected[0])
    grad = torch.randn(out.shape).bfloat16()
    mine, theirs = (
        blocks.block_backward(grad, q, k, v, out.float(), lse, causal, 0.3, name, segments)
        for name in ("varlen", "reference")
    )
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


def test_varlen_calls_ops_that_exist():
    """Names, argument order and shapes, on tensors without data."""
    q, k, v = (x.to("meta") for x in tensors(5, 7, widths=(12, 6), dtype=torch.bfloat16))
    out, lse = blocks.block_forward(q, k, v, True, 0.3, "varlen")
    assert out.shape == (5, 6, 6) and lse.shape == (6, 5) and lse.dtype == torch.float32
    grads = blocks.block_backward(out, q, k, v, out.float(), lse, True, 0.3, "varlen")
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
