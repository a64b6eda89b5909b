"""A linear layer by some rows of its weight, whose gradient goes straight to these rows of the main gradient.

Megatron-LM's DDP keeps a `main_grad` (often fp32) for every parameter and adds `parameter.grad` to it in a hook. A
slice of a weight would hand autograd a gradient of the full size, mostly zeros, for each slice and block: DeepSeek-V2's
KV up-projection has 16.8 million elements a layer.

What autograd gets instead is an expanded zero. The hook runs, once a backward, as `overlap_grad_reduce` insists, and
adds it to `main_grad`: nothing, or the gradient of others that use the weight in its ordinary module, with which
autograd has summed it. `grad_added_to_main_grad` is therefore left alone. Setting it would make the hook drop
`parameter.grad`, theirs included, for the rest of the step, for it is reset once a step only: a later micro-batch at CP
degree 1 would lose its gradient. Megatron-LM's fused layers may set it; ours is in `main_grad` by then.
"""

import torch
from torch.autograd.function import once_differentiable


class WeightGradient:
    """Where the weight gradient of one backward goes; `result` is what autograd gets."""

    def __init__(self, weight: torch.Tensor, owner: torch.Tensor):
        """`owner` is the parameter that `weight` is, or (in a recomputed part) is a detached copy of."""
        main_grad = getattr(owner, "main_grad", None)
        if main_grad is None:
            self._into = self.result = torch.zeros_like(weight)
        else:
            self._into, self.result = main_grad, weight.new_zeros(()).expand_as(weight)

    def add(self, rows: slice, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add grad [n, o]^T x [n, i] to `rows` (o of them)."""
        into = self._into[rows]
        if into.dtype == x.dtype:
            into.addmm_(grad.t(), x)
        else:
            into.add_(grad.t() @ x)


def sliced_linear(
    x: torch.Tensor, weight: torch.Tensor, rows: slice, owner: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, i] times `rows` (o of them) of weight [out, i] -> [n, o]; for `owner` see WeightGradient."""
    # in a tuple, which autograd doesn't look into: as an input, the owner's hooks would run for its missing gradient
    return _SlicedLinear.apply(x, weight, rows, (weight if owner is None else owner,))


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, rows: slice, owner: tuple[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, (ctx.owner,) = rows, owner
        return x @ weight[rows].t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            gradient = WeightGradient(weight, ctx.owner)
            gradient.add(ctx.rows, grad, x)
            of_weight = gradient.result
        return grad @ weight[ctx.rows], of_weight, None, None
