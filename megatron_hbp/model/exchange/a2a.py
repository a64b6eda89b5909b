"""a2a, heads for sequence: the all-to-all that turns some tokens of all heads into all tokens of some heads (Ulysses).

Legend: `x` tokens of the shared samples, `x_r` of them here, `c` CP degree, `h` query heads, `k` KV heads, `d` and `dv`
head widths, `m` = lcm(k, c) KV heads after replication.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_hbp.model.exchange.collectives import Transfer, all_to_all_rows
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.split import Shared


def start(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> Callable[[Kernel, float], torch.Tensor]:
    """Attention with h / c heads over all x tokens between two all-to-alls, of which the first is started here."""
    heads_under_way = sequence_to_heads(q, k, v, shared, group)

    def finish(kernel: Kernel, scale: float) -> torch.Tensor:
        return heads_to_sequence(kernel(*heads_under_way(), shared.segments, scale), shared, group)

    return finish


def sequence_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """[x_r, h, d], [x_r, k, d], [x_r, k, dv] -> [x, h/c, d], [x, m/c, d], [x, m/c, dv], in one all-to-all.

    It is started here; the answer waits for it. KV heads need not divide: they are replicated up to lcm(k, c), which
    divides h whenever both k and c do.
    """
    c = len(shared.counts)
    copies = math.lcm(k.shape[1], c) // k.shape[1]
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    x_r = q.shape[0]
    per_rank = [part.reshape(x_r, c, part.shape[1] // c * part.shape[2]) for part in (q, k, v)]
    widths = [part.shape[2] for part in per_rank]
    rows = torch.cat(per_rank, dim=2).transpose(0, 1).flatten(0, 1)  # [c * x_r, w], head blocks in rank order
    transfer = Transfer(rows, (x_r,) * c, shared.counts, group)
    shapes = [(part.shape[1] // c, part.shape[2]) for part in (q, k, v)]

    def arrived() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        received = transfer.wait()  # [x, w]
        if shared.to_pack is not None:
            received = received.index_select(0, shared.to_pack)
        parts = received.split(widths, dim=1)
        mine = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return mine[0], mine[1], mine[2]

    return arrived


def heads_to_sequence(out: torch.Tensor, shared: Shared, group: dist.ProcessGroup) -> torch.Tensor:
    """[x, h/c, dv] -> [x_r, h, dv]: the way back."""
    c = len(shared.counts)
    x_r, heads, width = shared.counts[dist.get_rank(group)], out.shape[1], out.shape[2]
    if shared.to_ranks is not None:
        out = out.index_select(0, shared.to_ranks)
    received = all_to_all_rows(out.flatten(1), shared.counts, (x_r,) * c, group)  # [c * x_r, h/c * dv]
    return received.reshape(c, x_r, heads * width).transpose(0, 1).reshape(x_r, c * heads, width)
