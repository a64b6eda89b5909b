"""p2p, keys and values in a ring: they pass every rank once, and each attends to them while the next are on their way.

The bytes of all_gather, hidden under attention, and without all keys in memory at once. Rank r sends to r + 1: in step
i it works on the keys of rank r - i. The backward passes keys and values round again, each followed, one hop behind, by
the gradient that the visited ranks have summed for it; this starts on the rank after the owner and ends at the owner,
which adds its own share. So of one layer a rank receives per local token, with k (d + dv) widths,

    forward   k (d + dv) (c - 1) elements
    backward  k (d + dv) (c - 1) elements, and as many again that are fp32 for half precision: three times the bytes

Legend as in a2a.py; `flat` is a rank's keys and then its values in one row of numbers: one message a hop.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_hbp.model import blocks
from megatron_hbp.model.exchange.collectives import count
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.split import Segments, Shared


def start(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> Callable[[Kernel, float], torch.Tensor]:
    """Attention of this rank's queries over the keys and values of all ranks, a rank at a time.

    Nothing is started yet: the ring's transfers hide under its own blocks.
    """

    def finish(kernel: Kernel, scale: float) -> torch.Tensor:
        return _Ring.apply(q, k, v, shared, group, blocks.name_of(kernel), scale)

    return finish


class Hop:
    """A message to the next rank of the ring and one from the previous rank, both under way."""

    def __init__(self, outgoing: torch.Tensor, size: int, group: dist.ProcessGroup):
        """Start sending `outgoing` [any] and receiving `size` numbers of the same dtype.

        Without rows one number stands for none: NCCL requires every rank of the group in its first batch.
        """
        ranks, here = dist.get_process_group_ranks(group), dist.get_rank(group)
        following, previous = ranks[(here + 1) % len(ranks)], ranks[here - 1]
        self.outgoing = outgoing if outgoing.numel() else outgoing.new_zeros(1)  # kept until it is sent
        self.size, self.incoming = size, outgoing.new_empty(max(1, size))
        self.work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.outgoing, following, group),
                dist.P2POp(dist.irecv, self.incoming, previous, group),
            ]
        )
        count(group, [size * outgoing.element_size() if rank == previous else 0 for rank in ranks])

    def wait(self) -> torch.Tensor:
        """What has arrived, [size]."""
        for work in self.work:
            work.wait()
        return self.incoming[: self.size]


def around(mine: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Iterator[tuple[int, torch.Tensor]]:
    """(rank, its numbers [sizes[rank]]) for every rank against the ring, this one first; the next is on its way."""
    c, here = len(sizes), dist.get_rank(group)
    held = mine
    for step in range(c):
        rank = (here - step) % c
        hop = Hop(held, sizes[rank - 1], group) if step < c - 1 else None
        yield rank, held
        if hop is not None:
            held = hop.wait()


class ReturningGradients:
    """Sums of gradients that travel with the ring until they reach the rank that owns them."""

    def __init__(self, sizes: Sequence[int], group: dist.ProcessGroup, like: torch.Tensor):
        """For `sizes[rank]` numbers of each rank, summed in the accumulation dtype of `like`."""
        self.sizes, self.group, self.here = sizes, group, dist.get_rank(group)
        self.like, self.dtype = like, blocks.accumulation_dtype(like.dtype)
        self.own = like.new_zeros(0)
        self.hop: Hop | None = None

    def so_far(self, rank: int) -> torch.Tensor:
        """The sum [sizes[rank]] of the ranks visited before, to add to in place; asked for after this rank's work."""
        if rank == self.here or self.hop is None:  # the first rank that an owner's keys visit starts the sum
            return self.like.new_zeros(self.sizes[rank], dtype=self.dtype)
        return self.hop.wait()

    def pass_on(self, rank: int, total: torch.Tensor) -> None:
        """Send the sum for `rank` on; this rank's own share stays here."""
        if rank == self.here:
            self.own = total
        else:
            self.hop = Hop(total, self.sizes[rank - 1], self.group)

    def arrived(self) -> torch.Tensor:
        """[sizes[here]]: what all ranks have summed for this one."""
        return self.own if self.hop is None else self.own.add_(self.hop.wait())


@dataclass(frozen=True, kw_only=True)
class Block:
    """Queries here and keys of one rank that they see, as local rows of either."""

    queries: slice
    keys: slice
    segments: Segments | None
    """Causal pieces of both; None where every query sees every key."""


def visible(shared: Shared, rank: int) -> list[Block]:
    """What the queries here see of the keys of `rank`.

    A range sees itself inside its samples. Of an earlier one it can share one sample only, that at its start.
    """
    found: list[Block] = []
    row = 0
    for mine in shared.ranges:
        queries = slice(row, row + mine.end - mine.start)
        head = slice(row, row + mine.segments.q[1])
        key_row = 0
        for start, end in shared.ranges_of[rank]:
            if start == mine.start:
                keys = slice(key_row, key_row + end - start)
                found.append(Block(queries=queries, keys=keys, segments=mine.segments.of_queries()))
            elif mine.key_start < end <= mine.start:
                keys = slice(key_row + max(0, mine.key_start - start), key_row + end - start)
                last = found[-1] if found else None
                if last and last.segments is None and last.queries == head and last.keys.stop == keys.start:
                    found.pop()  # the second of two mirrored slices: one kernel and one merge for both
                    keys = slice(last.keys.start, keys.stop)
                found.append(Block(queries=head, keys=keys, segments=None))
            key_row += end - start
        row = queries.stop
    return found


def _flat(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat((k.reshape(-1), v.reshape(-1)))


def _keys_and_values(flat: torch.Tensor, rows: int, k: torch.Size, v: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [rows, g, d] and [rows, g, dv] of a rank's numbers."""
    border = rows * k[1] * k[2]
    return flat[:border].view(rows, *k[1:]), flat[border:].view(rows, *v[1:])


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: Shared, group: dist.ProcessGroup,
        name: str, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        sizes = _sizes(shared, k, v)
        out, lse = blocks.nothing_seen(q, v.shape[2])
        for rank, flat in around(_flat(k, v), sizes, group):
            keys, values = _keys_and_values(flat, shared.counts[rank], k.shape, v.shape)
            for block in visible(shared, rank):
                part = blocks.block_forward(
                    q[block.queries], keys[block.keys], values[block.keys], block.segments is not None, scale, name,
                    block.segments,
                )  # fmt: skip
                blocks.merge(out[block.queries], lse[:, block.queries], *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shared, ctx.group, ctx.name, ctx.scale = shared, group, name, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        shared: Shared = ctx.shared
        sizes = _sizes(shared, k, v)
        dq = torch.zeros_like(q, dtype=blocks.accumulation_dtype(q.dtype))
        returning = ReturningGradients(sizes, ctx.group, k)
        for rank, flat in around(_flat(k, v), sizes, ctx.group):
            keys, values = _keys_and_values(flat, shared.counts[rank], k.shape, v.shape)
            parts = []
            for block in visible(shared, rank):
                at = block.queries
                dq_i, *of_keys = blocks.block_backward(
                    grad_out[at], q[at], keys[block.keys], values[block.keys], out[at], lse[:, at],
                    block.segments is not None, ctx.scale, ctx.name, block.segments,
                )  # fmt: skip
                dq[at] += dq_i
                parts.append((block.keys, of_keys))
            total = returning.so_far(rank)  # only now: its transfer, too, hides under the work above
            dk, dv = _keys_and_values(total, shared.counts[rank], k.shape, v.shape)
            for at, (dk_i, dv_i) in parts:
                dk[at] += dk_i
                dv[at] += dv_i
            returning.pass_on(rank, total)
        dk, dv = _keys_and_values(returning.arrived(), k.shape[0], k.shape, v.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _sizes(shared: Shared, k: torch.Tensor, v: torch.Tensor) -> list[int]:
    """Numbers of each rank's keys and values."""
    return [rows * (k.shape[1] * k.shape[2] + v.shape[1] * v.shape[2]) for rows in shared.counts]
