"""RMSNorm in plain torch that allows sequence parallelism and recompute to the bit.

The wrapper that Megatron-LM's local layers use (`WrappedTorchNorm`) refuses sequence parallelism, which MoE with TP > 1
insists on; and torch's own RMSNorm is, on CPU, several autograd nodes. Its input then gets three gradients (residual,
product, mean of squares), and recomputing the norm sums them in another order: 2e-16 instead of nothing.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceParallelRMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, with Megatron-LM's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron-LM sums the gradient of a weight so marked over the tensor-parallel group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]; half precision is normalised in fp32."""
        return _RmsNorm.apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """One node: its input gets one gradient, whatever recompute does."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x.to(scale.dtype) * scale
        slope = (grad * weight).to(scale.dtype)
        along = (slope * normalised).mean(dim=-1, keepdim=True)
        grad_x = (slope - normalised * along) * scale
        grad_weight = (grad * normalised.to(grad.dtype)).flatten(0, -2).sum(dim=0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
