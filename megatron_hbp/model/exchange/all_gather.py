"""all_gather, keys and values to the queries: every rank gathers those of the others and attends from its own queries.

With grouped-query attention this moves less than heads for sequence at small CP degrees, and it has no limit by heads.
The work is balanced under the zigzag layout only. Legend as in a2a.py.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_hbp.model.exchange.collectives import all_gather_rows
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.split import Shared


def start(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> Callable[[Kernel, float], torch.Tensor]:
    """Attention of this rank's queries over keys and values gathered in one call."""
    widths = (k.shape[2], v.shape[2])
    gathered = all_gather_rows(torch.cat((k, v), dim=2), shared.counts, group)  # [x, k, d + dv]
    return functools.partial(_attend, q, gathered, widths, shared)


def _attend(
    q: torch.Tensor, gathered: torch.Tensor, widths: tuple[int, int], shared: Shared, kernel: Kernel, scale: float
) -> torch.Tensor:
    if shared.to_pack is not None:
        gathered = gathered.index_select(0, shared.to_pack)
    k, v = gathered.split(widths, dim=2)
    parts, at = [], 0
    for piece in shared.ranges:
        num_queries = piece.end - piece.start
        keys = slice(piece.key_start, piece.end)
        parts.append(kernel(q[at : at + num_queries], k[keys], v[keys], piece.segments, scale))
        at += num_queries
    if parts:
        return torch.cat(parts)
    # a rank without shared tokens still takes part in the gather, and in its backward
    return q.new_zeros((0, q.shape[1], widths[1])) + 0 * (gathered.sum() + q.sum())
