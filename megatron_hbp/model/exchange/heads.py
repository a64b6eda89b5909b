"""Heads for sequence: the all-to-all that turns some tokens of all heads into all tokens of some heads (Ulysses).

Legend: `x` tokens of the shared samples, `x_r` of them here, `c` CP degree, `h` query heads, `k` KV heads, `d` and `dv`
head widths, `m` = lcm(k, c) KV heads after replication.
"""

import math

import torch
import torch.distributed as dist

from megatron_hbp.model.exchange.collectives import all_to_all_rows
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.split import Shared


def shared_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup, kernel: Kernel,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention with h / c heads over all x tokens between two all-to-alls."""
    q, k, v = sequence_to_heads(q, k, v, shared, group)
    return heads_to_sequence(kernel(q, k, v, shared.segments, scale), shared, group)


def sequence_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[x_r, h, d], [x_r, k, d], [x_r, k, dv] -> [x, h/c, d], [x, m/c, d], [x, m/c, dv], in one all-to-all.

    KV heads need not divide: they are replicated up to lcm(k, c), which divides h whenever both k and c do.
    """
    c = len(shared.counts)
    copies = math.lcm(k.shape[1], c) // k.shape[1]
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    x_r = q.shape[0]
    per_rank = [part.reshape(x_r, c, part.shape[1] // c * part.shape[2]) for part in (q, k, v)]
    widths = [part.shape[2] for part in per_rank]
    rows = torch.cat(per_rank, dim=2).transpose(0, 1).flatten(0, 1)  # [c * x_r, w], head blocks in rank order
    received = all_to_all_rows(rows, (x_r,) * c, shared.counts, group)  # [x, w]
    if shared.to_pack is not None:
        received = received.index_select(0, shared.to_pack)
    parts = received.split(widths, dim=1)
    mine = [part.unflatten(1, (-1, x.shape[2])) for part, x in zip(parts, (q, k, v), strict=True)]
    return mine[0], mine[1], mine[2]


def heads_to_sequence(out: torch.Tensor, shared: Shared, group: dist.ProcessGroup) -> torch.Tensor:
    """[x, h/c, dv] -> [x_r, h, dv]: the way back."""
    c = len(shared.counts)
    x_r, width = shared.counts[dist.get_rank(group)], out.shape[2]
    if shared.to_ranks is not None:
        out = out.index_select(0, shared.to_ranks)
    received = all_to_all_rows(out.flatten(1), shared.counts, (x_r,) * c, group)  # [c * x_r, h/c * dv]
    per_rank = received.reshape(c, x_r, received.shape[1])  # no -1: a rank may hold no shared token
    return per_rank.transpose(0, 1).reshape(x_r, c * out.shape[1], width)
