"""RMSNorm as one autograd node: torch's values, exact gradients, each dtype kept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hbp.model.norm import SequenceParallelRMSNorm


def norms(dtype: torch.dtype, *, sequence_parallel: bool = False) -> tuple[SequenceParallelRMSNorm, torch.nn.RMSNorm]:
    """Ours, as Megatron-LM constructs it, and torch's, with the same random weight."""
    torch.manual_seed(0)
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    ours = SequenceParallelRMSNorm(config, hidden_size=12, eps=1e-3)
    theirs = torch.nn.RMSNorm(12, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.normal_())
    return ours, theirs


def outcome(norm: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of a random projection of it."""
    leaf = x.clone().requires_grad_()
    out = norm(leaf)
    torch.manual_seed(2)
    return out, *torch.autograd.grad(out, (leaf, norm.weight), torch.randn_like(out))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_values_and_gradients_are_torchs(dtype, tolerance):
    ours, theirs = norms(dtype)
    x = torch.randn(7, 1, 12, dtype=dtype) * 3
    for mine, other in zip(outcome(ours, x), outcome(theirs, x), strict=True):
        assert mine.dtype == dtype and mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_gradients_against_finite_differences():
    ours, _ = norms(torch.float64)
    x = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: torch.func.functional_call(ours, {"weight": weight}, (x,)),
                                    (x, ours.weight))  # fmt: skip


def test_a_residual_beside_it_is_added_last():
    """The gradient is residual + norm's, two terms: a recomputed norm then gives the same bits."""
    ours, _ = norms(torch.float32)
    x = torch.randn(64, 1, 12, requires_grad=True)
    out, residual = ours(x), x * 1.0
    towards = torch.randn_like(out)
    (together,) = torch.autograd.grad((out, residual), x, (towards, towards))
    alone = x.detach().requires_grad_()
    (of_norm,) = torch.autograd.grad(ours(alone), alone, towards)
    assert torch.equal(together, of_norm + towards)


def test_a_row_of_zeros_stays_finite():
    ours, _ = norms(torch.float32)
    out, *gradients = outcome(ours, torch.zeros(2, 1, 12))
    assert not out.any() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weight_says_whether_its_gradient_is_to_be_summed(sequence_parallel):
    weight: Any = norms(torch.float32, sequence_parallel=sequence_parallel)[0].weight
    assert weight.sequence_parallel is sequence_parallel
