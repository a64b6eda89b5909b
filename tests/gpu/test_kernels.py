"""Kernels on a CUDA device: they agree in pairs, and bf16 costs them no more than it costs torch's own attention.

The judge is `reference` in fp64. `reference` in bf16 is torch's scaled_dot_product_attention, a call a sample: what the
kernels may be 1.2 times as wrong as.
"""

import itertools

import numpy as np
import pytest
import torch

from megatron_hbp.model import kernels
from megatron_hbp.model.split import Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LIMIT, OF_TORCH = 1e-2, 1.2
"""Relative error against fp64, and times that of torch's attention in bf16."""
SHAPES = {
    "grouped queries, 128 wide": (32, 8, 128, 128),
    "one KV head": (8, 1, 128, 128),
    "latent attention": (16, 16, 192, 128),
    "64 wide": (16, 4, 64, 64),
}
"""Query heads, KV heads, width of queries and keys, of values."""
LENGTHS = {
    "ragged": [1, 200, 3, 1777, 64, 1, 900],
    "one long sample": [4096],
    "many short ones": [37] * 100,
}
NAMES = [name for name in kernels.KERNELS if name != "reference"]


def runs_here(name: str) -> None:
    if why := kernels.why_not(name, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"{name}: {why}")


def inputs(shape: str, lengths: str, *, more_keys: int = 0):
    """q, k, v in bf16, their segments, the scale, and a direction for the backward."""
    heads, kv_heads, width, v_width = SHAPES[shape]
    q_starts = np.concatenate(([0], np.cumsum(LENGTHS[lengths])))
    k_starts = q_starts + np.concatenate(([0], np.full(len(q_starts) - 1, more_keys)))  # the first piece has more keys
    device, t, u = torch.device("cuda"), int(q_starts[-1]), int(k_starts[-1])
    torch.manual_seed(0)
    sizes = ((t, heads, width), (u, kv_heads, width), (u, kv_heads, v_width), (t, heads, v_width))
    q, k, v, towards = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes)
    return (q, k, v), Segments.of(q_starts.tolist(), k_starts.tolist(), device=device), width**-0.5, towards


def results(name: str, tensors, segments, scale, towards, *, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """Output and gradients of q, k, v in fp64."""
    leaves = q, k, v = tuple(x.detach().to(dtype).requires_grad_() for x in tensors)
    out = kernels.KERNELS[name](q, k, v, segments, scale)
    return [x.double() for x in (out, *torch.autograd.grad(out, leaves, towards.to(dtype)))]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("more_keys", [0, 129])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_bf16_error(name, shape, lengths, more_keys):
    runs_here(name)
    asked = inputs(shape, lengths, more_keys=more_keys)
    exact = results("reference", *asked, dtype=torch.float64)
    torchs, mine = results("reference", *asked), results(name, *asked)
    for what, x, y, z in zip(("output", "q", "k", "v"), mine, torchs, exact, strict=True):
        assert error(x, z) < LIMIT, what
        assert error(x, z) <= OF_TORCH * error(y, z), what


@pytest.mark.parametrize("left, right", itertools.combinations(kernels.KERNELS, 2))
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_in_pairs(left, right, shape):
    runs_here(left)
    runs_here(right)
    asked = inputs(shape, "ragged")
    for x, y in zip(results(left, *asked), results(right, *asked), strict=True):
        assert error(x, y) < 2 * LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_see_each_other(name):
    runs_here(name)
    (q, k, v), segments, scale, _ = inputs("grouped queries, 128 wide", "ragged")
    kernel = kernels.KERNELS[name]
    before = kernel(q, k, v, segments, scale)
    start, end = segments.k[3], segments.k[4]
    k[start:end], v[start:end] = 0, 0
    after = kernel(q, k, v, segments, scale)
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])
