"""A ring of MLA's latents: queries stay, the others' latents come by and become keys and values at each visit.

Legend: as in model/latents.py; `b` rows of the latents at hand, w = d - r + dv a head of the up-projection's rows.

Only one visited range of keys and values, at most s tokens with all heads, stands in memory at a time: keys and values
of DeepSeek-V2 are 40,960 wide, the latents that pass 576. The backward passes the latents once more and, a step
behind, the gradients of the latents, to which every visited rank adds its share; it up-projects again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_hbp.model.blocks import (
    accumulation_dtype,
    block_backward,
    block_forward,
    merge,
    name_of,
    nothing_seen,
)
from megatron_hbp.model.exchange.collectives import count
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.sliced import WeightGradient
from megatron_hbp.model.split import Segments, Shared


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A block of attention: queries that lie here over keys of the visited rank."""

    queries: slice
    """Of the x_r rows that lie here."""
    keys: slice
    """Of the b rows of the visited rank."""
    segments: Segments | None
    """The pieces, causal, where the block is the rank's own range; None where all queries see all keys."""


def visits(shared: Shared, here: int, visited: int) -> Iterator[tuple[slice, list[Visit]]]:
    """For each range of keys of rank `visited` that queries of rank `here` see: its rows, and who sees them."""
    row = 0
    for start, end in shared.ranges_of[visited]:
        found, at = [], 0
        for piece in shared.ranges:
            size = piece.end - piece.start
            if visited == here and (start, end) == (piece.start, piece.end):
                found.append(Visit(queries=slice(at, at + size), keys=slice(row, row + size), segments=piece.own))
            elif end <= piece.start and end > piece.key_start:
                # only the first sample of the queries reaches back beyond their range
                first = max(start, piece.key_start) - start
                queries = slice(at, at + piece.segments.q[1])
                found.append(Visit(queries=queries, keys=slice(row + first, row + end - start), segments=None))
            at += size
        if found:
            yield slice(min(visit.keys.start for visit in found), row + end - start), found
        row += end - start


@dataclass(frozen=True, kw_only=True, eq=False)
class Ring:
    """What both directions of a ring know besides tensors."""

    shared: Shared
    group: dist.ProcessGroup
    scale: float
    kernel: str
    rope_width: int
    v_width: int
    num_heads: int
    owner: torch.Tensor
    """The parameter that gets the weight's gradient; out of autograd's sight here (model/sliced.py)."""

    @property
    def here(self) -> int:
        """This rank in the group."""
        return dist.get_rank(self.group)

    @property
    def degree(self) -> int:
        """Ranks of the group."""
        return len(self.shared.counts)

    def visited(self, step: int) -> int:
        """Whose latents are here in a step; in step 0 the rank's own."""
        return (self.here - step) % self.degree

    def passed_on(self, rows: torch.Tensor, step: int) -> "Transfer":
        """Start to send the rows of this step's rank on and to receive those of the next."""
        return Transfer(rows, self.shared.counts[self.visited(step + 1)], self.group)

    def keys_values(self, latents: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, l + r] -> k [b, h, d], v [b, h, dv]."""
        compressed, rope = latents.split((weight.shape[1], self.rope_width), dim=1)
        kv = (compressed @ weight.t()).unflatten(1, (self.num_heads, -1))
        k = torch.cat((kv[..., : -self.v_width], rope[:, None].expand(-1, self.num_heads, -1)), dim=2)
        return k, kv[..., -self.v_width :]


class Transfer:
    """Rows on their way around the ring, one hop."""

    def __init__(self, rows: torch.Tensor, num_received: int, group: dist.ProcessGroup):
        ranks, here = dist.get_process_group_ranks(group), dist.get_rank(group)
        before, after = ranks[here - 1], ranks[(here + 1) % len(ranks)]
        self._sent = rows.contiguous()  # kept alive until it has left
        self._received = rows.new_empty((num_received, *rows.shape[1:]))
        hops = [(dist.isend, self._sent, after), (dist.irecv, self._received, before)]
        # both ends know the counts: no empty messages
        operations = [dist.P2POp(do, tensor, rank, group) for do, tensor, rank in hops if tensor.numel()]
        self._work: list[Any] = dist.batch_isend_irecv(operations) if operations else []
        num_bytes = self._received.numel() * self._received.element_size()
        count(group, [num_bytes * (rank == before) for rank in ranks])

    def wait(self) -> torch.Tensor:
        """The rows that came."""
        for work in self._work:
            work.wait()
        return self._received


def ring_attention(
    q: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor, owner: torch.Tensor, shared: Shared,
    group: dist.ProcessGroup, kernel: Kernel, scale: float, rope_width: int, v_width: int,
) -> torch.Tensor:  # fmt: skip
    """q [x_r, h, d], latents [x_r, l + r], weight [h w, l] (of parameter `owner`) -> [x_r, h, dv]."""
    ring = Ring(
        shared=shared, group=group, scale=scale, kernel=name_of(kernel), rope_width=rope_width, v_width=v_width,
        num_heads=q.shape[1], owner=owner,
    )  # fmt: skip
    return _LatentRing.apply(q, latents, weight, ring)


class _LatentRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor, ring: Ring) -> torch.Tensor:
        out, lse = nothing_seen(q, ring.v_width)
        block = latents
        for step in range(ring.degree):
            coming = ring.passed_on(block, step) if step + 1 < ring.degree else None
            for rows, found in visits(ring.shared, ring.here, ring.visited(step)):
                k, v = ring.keys_values(block[rows], weight)
                for visit in found:
                    mine, keys = visit.queries, slice(visit.keys.start - rows.start, None)
                    out_i, lse_i = block_forward(
                        q[mine], k[keys], v[keys], visit.segments is not None, ring.scale, ring.kernel, visit.segments
                    )
                    merge(out[mine], lse[:, mine], out_i, lse_i)
            block = coming.wait() if coming else block
        out = out.to(q.dtype)
        ctx.save_for_backward(q, latents, weight, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, latents, weight, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        dtype = accumulation_dtype(q.dtype)  # c shares of a latent's gradient add up on the way: not in bf16
        of_q = torch.zeros_like(q, dtype=dtype)
        of_weight = WeightGradient(weight, ring.owner) if ctx.needs_input_grad[2] else None
        block, own, returning = latents, None, None
        for step in range(ring.degree):
            coming = ring.passed_on(block, step) if step + 1 < ring.degree else None
            of_block = torch.zeros_like(block, dtype=dtype)
            for rows, found in visits(ring.shared, ring.here, ring.visited(step)):
                _add_visit(ring, rows, found, (grad_out, q, block, weight, out, lse), of_q, of_block, of_weight)
            if step == 0:
                own = of_block
            else:
                returning = ring.passed_on(of_block.add_(returning.wait()) if returning else of_block, step)
            block = coming.wait() if coming else block
        assert own is not None and returning is not None
        own += returning.wait()
        result = of_weight.result if of_weight else None
        return of_q.to(q.dtype), own.to(latents.dtype), result, None


def _add_visit(
    ring: Ring, rows: slice, found: list[Visit], saved: tuple[torch.Tensor, ...], of_q: torch.Tensor,
    of_block: torch.Tensor, of_weight: WeightGradient | None,
) -> None:  # fmt: skip
    """Add what a visited range of keys gives to the gradients of queries, latents and weight."""
    grad_out, q, block, weight, out, lse = saved
    k, v = ring.keys_values(block[rows], weight)
    of_k, of_v = torch.zeros_like(k, dtype=of_q.dtype), torch.zeros_like(v, dtype=of_q.dtype)
    for visit in found:
        mine, keys = visit.queries, slice(visit.keys.start - rows.start, None)
        dq, dk, dv = block_backward(
            grad_out[mine], q[mine], k[keys], v[keys], out[mine], lse[:, mine], visit.segments is not None,
            ring.scale, ring.kernel, visit.segments,
        )  # fmt: skip
        of_q[mine] += dq
        of_k[keys] += dk
        of_v[keys] += dv
    plain, rotary = of_k.split((of_k.shape[2] - ring.rope_width, ring.rope_width), dim=2)
    of_kv = torch.cat((plain, of_v), dim=2).flatten(1).to(weight.dtype)  # [b, h w]
    compressed = block[rows, : weight.shape[1]]
    of_block[rows, : weight.shape[1]] += of_kv @ weight
    of_block[rows, weight.shape[1] :] += rotary.sum(1)
    if of_weight is not None:
        of_weight.add(slice(None), of_kv, compressed)
