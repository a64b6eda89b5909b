"""The reference kernel against softmax written out in fp64, with the mask spelled out."""

import math

import numpy as np
import pytest
import torch

from megatron_hbp.errors import ConfigError
from megatron_hbp.model import kernels
from megatron_hbp.model.split import Segments

LENGTHS = [5, 1, 9, 2]
SEGMENTS = Segments.of([0, *np.cumsum(LENGTHS).tolist()], device=torch.device("cpu"))


def naive(q, k, v, lengths, scale):
    """Head by head, row by row: token i sees token j iff they are of one sample and j <= i."""
    t, heads = q.shape[:2]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(t)
    seen = (sample[:, None] == sample[None]) & (order[:, None] >= order[None])
    group = heads // k.shape[1]
    out = []
    for head in range(heads):
        scores = (q[:, head] @ k[:, head // group].T * scale).masked_fill(~seen, -math.inf)
        weights = (scores - scores.max(1, keepdim=True).values).exp()
        out.append(weights / weights.sum(1, keepdim=True) @ v[:, head // group])
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("value_width", [8, 5, 11])
def test_reference_is_softmax_attention(kv_heads, value_width):
    torch.manual_seed(0)
    t, scale = sum(LENGTHS), 0.37
    q = torch.randn(t, 6, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(t, kv_heads, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(t, kv_heads, value_width, dtype=torch.float64, requires_grad=True)
    out = kernels.reference(q, k, v, SEGMENTS, scale)
    expected = naive(q, k, v, LENGTHS, scale)
    assert out.shape == (t, 6, value_width)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)

    towards = torch.randn_like(out)
    for mine, theirs in zip(*(torch.autograd.grad(x, (q, k, v), towards) for x in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_samples_do_not_see_each_other():
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 2, 4, dtype=torch.float64) for _ in range(3))
    before = kernels.reference(q, k, v, SEGMENTS, 0.5)
    k[6:15], v[6:15] = 0, 0  # the third sample
    after = kernels.reference(q, k, v, SEGMENTS, 0.5)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[15:], after[15:])
    assert not torch.equal(before[6:15], after[6:15])


def test_more_keys_than_queries_are_aligned_at_their_ends():
    """The last 3 queries of a sample of 9 and a whole sample of 2 give the rows that all queries give."""
    torch.manual_seed(0)
    k, v = (torch.randn(11, 2, 4, dtype=torch.float64) for _ in range(2))
    q = torch.randn(11, 4, 4, dtype=torch.float64)
    whole = naive(q, k, v, [9, 2], 0.5)
    segments = Segments.of([0, 3, 5], [0, 9, 11], device=torch.device("cpu"))
    torch.testing.assert_close(kernels.reference(q[6:], k, v, segments, 0.5), whole[6:], rtol=0, atol=1e-13)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these packages are installed, and no other kernel's."""
    kernels.select.cache_clear()
    names: set[str] = set()
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name if name in names else None)
    yield names
    kernels.select.cache_clear()


@pytest.mark.parametrize(
    "packages, device, dtype, kernel",
    [
        ((), "cuda", torch.bfloat16, kernels.varlen),
        ((), "cuda", torch.float16, kernels.varlen),
        (("flash_attn",), "cuda", torch.bfloat16, kernels.flash),
        (("flash_attn", "transformer_engine"), "cuda", torch.bfloat16, kernels.te),
        (("flash_attn", "transformer_engine"), "cuda", torch.float32, kernels.reference),
        ((), "cuda", torch.float64, kernels.reference),
        (("flash_attn",), "cpu", torch.bfloat16, kernels.reference),
    ],
)
def test_choice(installed, packages, device, dtype, kernel):
    installed.update(packages)
    assert kernels.select("auto", torch.device(device), dtype) is kernel


@pytest.mark.parametrize(
    "name, device, reason",
    [("te", "cuda", "transformer_engine is not installed"), ("varlen", "cpu", "it needs CUDA and half precision")],
)
def test_a_kernel_that_cannot_run_is_refused(installed, name, device, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        kernels.select(name, torch.device(device), torch.bfloat16)
    assert "--hbp-kernel reference" in str(refused.value)


def test_a_named_kernel_is_that_kernel():
    assert kernels.select("reference", torch.device("cuda"), torch.bfloat16) is kernels.reference
