"""Causal attention over the samples of a pack, each sample alone: one signature, several kernels.

    kernel(q [t, h, d], k [t, m, d], v [t, m, dv], context, scale) -> [t, h, dv],  m divides h (grouped-query attention)

`reference` is plain torch, any dtype, any device: the yardstick of the tests. `varlen` is torch's FlashAttention entry
for CUDA in fp16 and bf16.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from megatron_hbp.model.context import MicroBatchContext

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, MicroBatchContext, float], torch.Tensor]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: MicroBatchContext, scale: float
) -> torch.Tensor:
    """One causal scaled_dot_product_attention a sample."""
    width = v.shape[2]
    if width < q.shape[2]:  # equal widths let torch take its flash path on CPU: no [n, n] matrix of an 8K sample
        v = F.pad(v, (0, q.shape[2] - width))
    copies = q.shape[1] // k.shape[1]
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [h, t, d]
    ends = context.segments
    samples = [
        F.scaled_dot_product_attention(
            q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], is_causal=True, scale=scale
        ).squeeze(0)
        for a, b in pairwise(ends)
    ]
    return torch.cat(samples, dim=1).transpose(0, 1)[..., :width]


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: MicroBatchContext, scale: float) -> torch.Tensor:
    """torch.nn.attention.varlen: one launch for the whole pack."""
    from torch.nn.attention.varlen import varlen_attn

    width = v.shape[2]
    if width < q.shape[2]:
        v = F.pad(v, (0, q.shape[2] - width))
    ends, longest = context.cu_seqlens, context.max_seqlen
    out = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return out[..., :width]


def choose(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for a device and a dtype: `varlen` for half precision on CUDA, else `reference`."""
    return varlen if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) else reference
