"""Heads for sequence: the all-to-all that turns a slice of all tokens into a slice of all heads, and back (Ulysses).

Shapes: `s` local tokens, `t` = s * c tokens of the pack, `c` CP degree, `h` query heads, `k` KV heads, `d` head widths.
Slices are contiguous: CP rank r holds tokens [r * s, (r + 1) * s) of the pack.
"""

import math

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_hbp.errors import ConfigError


class _AllToAll(torch.autograd.Function):
    """Send x[r] to rank r and return what each rank sent here, [c, ...] -> [c, ...]; its backward is itself."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()  # before empty_like, which would keep the strides of a transposed view
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def check_heads(num_query_heads: int, num_kv_heads: int, cp_degree: int) -> None:
    """Raise ConfigError where a CP degree cannot share out the heads that a tensor-parallel rank has.

    KV heads need not divide: they are replicated up to lcm(k, c), which divides h whenever both k and c do.
    """
    if num_query_heads % cp_degree:
        raise ConfigError(
            f"CP degree {cp_degree} cannot share out {num_query_heads} query heads ({num_kv_heads} KV heads) of a "
            f"tensor-parallel rank: choose a degree that divides them"
        )


def sequence_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[s, h, d], [s, k, d], [s, k, dv] -> [t, h/c, d], [t, m/c, d], [t, m/c, dv], m = lcm(k, c), in one all-to-all."""
    c = dist.get_world_size(group)
    check_heads(q.shape[1], k.shape[1], c)
    copies = math.lcm(k.shape[1], c) // k.shape[1]
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)

    s = q.shape[0]
    per_rank = [x.reshape(s, c, -1) for x in (q, k, v)]  # each [s, c, heads/c * width]: head blocks in rank order
    widths = [x.shape[2] for x in per_rank]
    received = _AllToAll.apply(torch.cat(per_rank, dim=2).transpose(0, 1).contiguous(), group)  # [c, s, w]
    parts = received.reshape(c * s, -1).split(widths, dim=1)
    mine = [part.reshape(c * s, -1, x.shape[2]) for part, x in zip(parts, (q, k, v), strict=True)]
    return mine[0], mine[1], mine[2]


def heads_to_sequence(out: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[t, h/c, dv] -> [s, h, dv]: the way back."""
    c = dist.get_world_size(group)
    t, heads, width = out.shape
    received = _AllToAll.apply(out.reshape(c, t // c, heads, width), group)  # [c, s, h/c, dv], heads in rank order
    return received.transpose(0, 1).reshape(t // c, c * heads, width)
