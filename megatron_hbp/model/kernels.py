"""Causal attention over the pieces of a pack, each piece alone: one signature, several kernels.

    kernel(q [t, h, d], k [u, m, d], v [u, m, dv], segments, scale) -> [t, h, dv]

where m divides h (grouped-query attention).

Piece i of the queries sees piece i of the keys, causal from the end: of more keys than queries, the first query sees
the surplus. `reference` is plain torch, any dtype, any device: the yardstick of the tests. `varlen` is torch's
FlashAttention entry for CUDA in fp16 and bf16.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from megatron_hbp.model.split import Segments

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, float], torch.Tensor]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """One causal scaled_dot_product_attention a piece."""
    width = v.shape[2]
    if width < q.shape[2]:  # equal widths let torch take its flash path on CPU: no [n, n] matrix of an 8K sample
        v = F.pad(v, (0, q.shape[2] - width))
    copies = q.shape[1] // k.shape[1]
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, h, t, d]
    pieces = [
        _causal(q[:, :, a:b], k[:, :, i:j], v[:, :, i:j], scale)
        for (a, b), (i, j) in zip(pairwise(segments.q), pairwise(segments.k), strict=True)
    ]
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)[..., :width]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, h, n, d] and [1, h, m, d], m >= n; query i sees keys up to i + m - n."""
    n, m = q.shape[2], k.shape[2]
    if n == m:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    sees = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    """torch.nn.attention.varlen: one launch for the whole pack."""
    from torch.nn.attention.varlen import varlen_attn

    width = v.shape[2]
    if width < q.shape[2]:
        v = F.pad(v, (0, q.shape[2] - width))
    out = varlen_attn(
        q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, scale=scale, window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return out[..., :width]


KERNELS: dict[str, Kernel] = {"reference": reference, "varlen": varlen}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel `name`; for "auto" `varlen` for half precision on CUDA, else `reference`."""
    if name == "auto":
        name = "varlen" if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) else "reference"
    return KERNELS[name]
