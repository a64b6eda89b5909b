"""Slices of a weight give it the gradient that the whole layer would, whoever else uses it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_hbp.model.sliced import sliced_linear


def weight_with_main_grad(dtype: torch.dtype, main_dtype: torch.dtype) -> tuple[Any, list]:
    """A parameter and Megatron-LM's DDP hook on it (distributed_data_parallel.py:475-494 of 0.19.2); calls of it."""
    weight: Any = torch.nn.Parameter(torch.randn(12, 5, dtype=dtype))  # Megatron-LM adds attributes
    weight.main_grad = torch.zeros(12, 5, dtype=main_dtype)
    weight.grad_added_to_main_grad = False
    calls: list[torch.nn.Parameter] = []

    def hook(parameter):
        calls.append(parameter)
        assert parameter.grad is not None
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    return weight, calls


def three_uses(x, weight, *, owner=None, ordinary=False):
    """Two slices that overlap in rows [4, 8), and the whole weight, each with its own factor."""
    whole = F.linear(x, weight) if ordinary else sliced_linear(x, weight, slice(0, 12), owner)
    upper, lower = (sliced_linear(x, weight, rows, owner) for rows in (slice(0, 8), slice(4, 12)))
    return whole.sin().sum() + (2 * upper).cos().sum() + (3 * lower).sin().sum()


def reference(x, weight):
    """The same without slices: gradients of x and weight."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    whole = F.linear(x, weight)
    (whole.sin().sum() + (2 * whole[:, :8]).cos().sum() + (3 * whole[:, 4:]).sin().sum()).backward()
    return x.grad, weight.grad


@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize("has_main_grad", [False, True])
def test_gradients_are_those_of_the_whole_layer(has_main_grad, ordinary):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, calls = weight_with_main_grad(torch.float64, torch.float64)
    if not has_main_grad:
        del weight.main_grad
        weight = torch.nn.Parameter(weight.detach().clone())
    of_x, of_weight = reference(x, weight)
    for times in (1, 2):  # a second micro-batch adds to the first
        x.grad = None
        three_uses(x, weight, ordinary=ordinary).backward()
        found = weight.main_grad if has_main_grad else weight.grad
        torch.testing.assert_close(found, times * of_weight, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(x.grad, of_x, rtol=1e-13, atol=1e-13)
    assert len(calls) == 2 * has_main_grad  # the hook runs once a backward


def test_a_detached_copy_adds_to_its_owner_and_runs_no_hook():
    x = torch.randn(7, 5, dtype=torch.float64)
    weight, calls = weight_with_main_grad(torch.float64, torch.float64)
    copy = weight.detach().requires_grad_()
    three_uses(x, copy, owner=weight).backward()
    torch.testing.assert_close(weight.main_grad, reference(x, weight)[1], rtol=1e-13, atol=1e-13)
    assert not calls and copy.grad.count_nonzero() == 0


def test_half_precision_adds_to_wide_main_gradients():
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    weight, _ = weight_with_main_grad(torch.bfloat16, torch.float32)
    three_uses(x, weight, ordinary=True).backward()
    assert weight.main_grad.dtype == torch.float32
    of_weight = reference(x.float(), weight.float())[1]
    torch.testing.assert_close(weight.main_grad, of_weight, rtol=0.05, atol=0.05 * of_weight.abs().max().item())


def test_a_frozen_weight_gets_nothing():
    x = torch.randn(7, 5, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(12, 5), requires_grad=False)
    sliced_linear(x, weight, slice(2, 4)).sum().backward()
    assert weight.grad is None and x.grad is not None
