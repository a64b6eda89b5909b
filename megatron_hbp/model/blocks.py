"""Attention over some of a query's keys, and how such blocks add up: what a ring of keys and values is made of.

    block_forward(q [n, h, d], k [m, g, d], v [m, g, dv], causal, scale, name) -> out [n, h, dv], lse [h, n]
    block_backward(grad_out, q, k, v, out, lse, causal, scale, name) -> dq, dk, dv

where g divides h. `lse` is the log of the sum of exp(scale q k) over the keys that a query sees, -inf where it sees
none; fp64 for fp64 inputs, else fp32. `merge` adds a block to what the queries have seen so far. The backward of a
block takes the *final* out and lse, over all blocks: its weights are exp(scores - lse), so no block waits for another.

Causal blocks are aligned at their ends, as in kernels.py; with `segments` a block has several pieces, each with keys of
its own. Kernels by `name`: `reference` is plain torch and the yardstick; `varlen` is torch's FlashAttention on CUDA.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from megatron_hbp.model.kernels import KERNELS, Kernel
from megatron_hbp.model.split import Segments

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WIDTHS = 8
"""FlashAttention takes head widths in multiples of this."""


def name_of(kernel: Kernel) -> str:
    """The blocks that go with a kernel: torch's own on CUDA, whatever the kernel, for they need the log-sum-exp."""
    return "reference" if kernel is KERNELS["reference"] else "varlen"


def block_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, name: str,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of n queries over m keys -> out [n, h, dv] in q's dtype, lse [h, n]."""
    if not len(q) or not len(k):
        out, lse = nothing_seen(q, v.shape[2])
        return out.to(q.dtype), lse
    if name == "varlen":
        return _varlen_forward(q, k, v, causal, scale, segments)
    assert name == "reference", name
    parts = [_reference_forward(q[i], k[j], v[j], causal, scale) for i, j in _pieces(q, k, segments)]
    return torch.cat([out for out, _ in parts]).to(q.dtype), torch.cat([lse for _, lse in parts], dim=1)


def block_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float, name: str, segments: Segments | None = None,
) -> Triple:  # fmt: skip
    """The block's share of dq [n, h, d] and the gradients dk [m, g, d], dv [m, g, dv] that its queries cause.

    `out` [n, h, dv] and `lse` [h, n] are those of the queries over all their keys, in the block and elsewhere.
    """
    if not len(q) or not len(k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if name == "varlen":
        return _varlen_backward(grad_out, q, k, v, out, lse, causal, scale, segments)
    assert name == "reference", name
    parts = [
        _reference_backward(grad_out[i], q[i], k[j], v[j], out[i], lse[:, i], causal, scale)
        for i, j in _pieces(q, k, segments)
    ]
    dq, dk, dv = (torch.cat(x) for x in zip(*parts, strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision: c bf16 roundings of an output would each cost 2^-9."""
    return torch.promote_types(dtype, torch.float32)


def nothing_seen(q: torch.Tensor, v_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where merging starts: out [n, h, dv] of zeros and lse [h, n] of -inf, both to accumulate in."""
    n, h, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    return q.new_zeros((n, h, v_width), dtype=dtype), q.new_full((h, n), -math.inf, dtype=dtype)


def merge(
    out: torch.Tensor, lse: torch.Tensor, out_i: torch.Tensor, lse_i: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's result (out_i, lse_i) to (out [n, h, dv], lse [h, n]), in place; returns these two.

    Safe for any size of scores, and where either has seen nothing (-inf). One pass over the output: memory is what a
    ring's merge costs.
    """
    total = torch.logaddexp(lse, lse_i.to(lse.dtype))
    share = torch.exp(lse_i - total.masked_fill(total == -math.inf, 0))  # -inf - -inf would be nan
    out.lerp_(out_i.to(out.dtype), share.T[:, :, None].to(out.dtype))
    lse.copy_(total)
    return out, lse


def _pieces(q: torch.Tensor, k: torch.Tensor, segments: Segments | None) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys, piece by piece."""
    if segments is None:
        yield slice(0, len(q)), slice(0, len(k))
        return
    for (a, b), (i, j) in zip(pairwise(segments.q), pairwise(segments.k), strict=True):
        yield slice(a, b), slice(i, j)


# ------------------------------------------- reference: query heads of one KV head below each other, [g, h/g * n]


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, h, w] -> [g, h/g * n, w] to accumulate in."""
    n, h, width = x.shape
    rows = x.transpose(0, 1).reshape(kv_heads, h // kv_heads * n, width)
    return rows.to(accumulation_dtype(x.dtype))


def _by_token(x: torch.Tensor, n: int) -> torch.Tensor:
    """The way back."""
    return x.reshape(-1, n, x.shape[2]).transpose(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor, n: int, causal: bool, scale: float) -> torch.Tensor:
    """[g, h/g * n, d], [g, m, d] -> [g, h/g * n, m], -inf where a query does not see a key."""
    scores = q @ k.transpose(1, 2) * scale
    if causal:
        m = k.shape[1]
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        scores = scores.unflatten(1, (-1, n)).masked_fill(hidden, -math.inf).flatten(1, 2)
    return scores


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """0 for -inf, which makes the weights of a query without keys exp(-inf) = 0 and not nan."""
    return lse.masked_fill(lse == -math.inf, 0)


def _reference_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    n, h, _ = q.shape
    g = k.shape[1]
    scores = _scores(_by_kv_head(q, g), _by_kv_head(k, g), n, causal, scale)
    lse = scores.logsumexp(2, keepdim=True)
    out = (scores - _finite(lse)).exp() @ _by_kv_head(v, g)
    return _by_token(out, n), lse.reshape(h, n)


def _reference_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float,
) -> Triple:  # fmt: skip
    n, g = q.shape[0], k.shape[1]
    grad, out, queries = (_by_kv_head(x, g) for x in (grad_out, out, q))
    keys, values = _by_kv_head(k, g), _by_kv_head(v, g)
    weights = (_scores(queries, keys, n, causal, scale) - _finite(lse).reshape(g, -1, 1)).exp()
    of_weights = grad @ values.transpose(1, 2) - (grad * out).sum(2, keepdim=True)
    of_scores = weights * of_weights * scale
    dv = weights.transpose(1, 2) @ grad  # [g, m, dv]; the rows of all query heads of a KV head add up here
    dk = of_scores.transpose(1, 2) @ queries
    return _by_token(of_scores @ keys, n), dk.transpose(0, 1), dv.transpose(0, 1)


# ------------------------------------------------------------ varlen: the ops behind torch.nn.attention.varlen (2.13)


def _padded(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x


def _flash_width(q: torch.Tensor, v: torch.Tensor) -> int:
    return -(-max(q.shape[2], v.shape[2]) // WIDTHS) * WIDTHS


def _flash_segments(q: torch.Tensor, k: torch.Tensor, segments: Segments | None) -> Segments:
    return Segments.of((0, len(q)), (0, len(k)), device=q.device) if segments is None else segments


def _varlen_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, segments: Segments | None
) -> tuple[torch.Tensor, torch.Tensor]:
    pieces, width, v_width = _flash_segments(q, k, segments), _flash_width(q, v), v.shape[2]
    q, k, v = (_padded(x, width) for x in (q, k, v))
    # what varlen_attn calls: -1 is no limit, a right window of 0 is causal, aligned at the ends
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, pieces.cu_q, pieces.cu_k, pieces.max_q, pieces.max_k, 0.0, causal, False,
        scale=scale, window_size_left=-1, window_size_right=0 if causal else -1,
    )  # fmt: skip
    # FlashAttention says +inf of a query without keys, which would take all the weight in a merge
    return out[..., :v_width], lse.masked_fill(lse == math.inf, -math.inf)


def _varlen_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float, segments: Segments | None,
) -> Triple:  # fmt: skip
    pieces, width = _flash_segments(q, k, segments), _flash_width(q, v)
    widths = (q.shape[2], k.shape[2], v.shape[2])
    grad_out, q, k, v, out = (_padded(x, width).contiguous() for x in (grad_out, q, k, v, out.to(q.dtype)))
    grads = torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse.masked_fill(lse == -math.inf, math.inf).contiguous(),
        pieces.cu_q, pieces.cu_k, pieces.max_q, pieces.max_k, 0.0, causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device),  # no dropout: unread
        scale=scale, window_size_left=-1, window_size_right=0 if causal else -1,
    )  # fmt: skip
    dq, dk, dv = (grad[..., :w] for grad, w in zip(grads, widths, strict=True))
    return dq, dk, dv
