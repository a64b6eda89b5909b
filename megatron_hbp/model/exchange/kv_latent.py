"""kv_latent, a ring of MLA's latents: queries stay, others' latents pass and become keys and values at each visit.

Only one rank's keys and values, and only those that are seen, stand in memory at a time: with all heads DeepSeek-V2's
are 40,960 wide, the latents that pass 576. The backward up-projects again; otherwise the ring is that of p2p.py, with
latents in the place of keys and values, so that of one layer a rank receives per local token

    forward   (l + r) (c - 1) elements
    backward  (l + r) (c - 1) elements, and as many again that are fp32 for half precision

Legend as in model/latents.py; `b` rows of the visited rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_hbp.model import blocks
from megatron_hbp.model import context as micro_batch
from megatron_hbp.model.exchange.p2p import Block, ReturningGradients, around, visible
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.sliced import WeightGradient
from megatron_hbp.model.split import Shared, Split, rows_at


def gather(q_latent: torch.Tensor, kv_latent: torch.Tensor, split: Split, group: dist.ProcessGroup) -> torch.Tensor:
    """Queries stay: their latents of the shared samples here, [x_r, q]."""
    return rows_at(q_latent, split.shared_at)


def project(
    up: Any, gathered: torch.Tensor, w_q: torch.Tensor, w_kv: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """[x_r, q] -> q [x_r, h, d] of all heads."""
    context = micro_batch.current()
    positions = rows_at(context.position_ids, context.split.shared_at)
    return (up.queries(gathered, w_q, range(up.num_heads), positions),)


def attend(
    up: Any, projected: tuple[torch.Tensor, ...], kv_latent: torch.Tensor, w_kv: torch.Tensor, kernel: Kernel,
    scale: float, split: Split, group: dist.ProcessGroup,
) -> torch.Tensor:  # fmt: skip
    """[x_r, h, dv] from the queries, the first of `projected`, and the ring of latents."""
    assert split.shared is not None
    return ring_attention(
        projected[0], rows_at(kv_latent, split.shared_at), w_kv, up.of_keys_values.weight, split.shared, group, kernel,
        scale, up.rope_width, up.v_width,
    )  # fmt: skip


def ring_attention(
    q: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor, owner: torch.Tensor, shared: Shared,
    group: dist.ProcessGroup, kernel: Kernel, scale: float, rope_width: int, v_width: int,
) -> torch.Tensor:  # fmt: skip
    """q [x_r, h, d], latents [x_r, l + r], weight [h (d - r + dv), l] (of parameter `owner`) -> [x_r, h, dv]."""
    ring = _Ring(
        shared=shared, group=group, scale=scale, kernel=blocks.name_of(kernel), num_heads=q.shape[1],
        latent_width=latents.shape[1], rope_width=rope_width, v_width=v_width, owner=owner,
    )  # fmt: skip
    return _LatentRing.apply(q, latents, weight, ring)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ring:
    """What both directions know besides tensors."""

    shared: Shared
    group: dist.ProcessGroup
    scale: float
    kernel: str
    num_heads: int
    latent_width: int
    """l + r."""
    rope_width: int
    v_width: int
    owner: torch.Tensor
    """The parameter that gets the weight's gradient; out of autograd's sight here (model/sliced.py)."""

    @property
    def sizes(self) -> list[int]:
        """Numbers of each rank's latents."""
        return [rows * self.latent_width for rows in self.shared.counts]

    def keys_values(self, latents: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, l + r] -> k [b, h, d], v [b, h, dv]."""
        compressed, rope = latents.split((weight.shape[1], self.rope_width), dim=1)
        kv = (compressed @ weight.t()).unflatten(1, (self.num_heads, -1))
        k = torch.cat((kv[..., : -self.v_width], rope[:, None].expand(-1, self.num_heads, -1)), dim=2)
        return k, kv[..., -self.v_width :]


def _seen(found: Sequence[Block]) -> slice:
    """The rows of the visited rank that any query here sees."""
    return slice(min(block.keys.start for block in found), max(block.keys.stop for block in found))


def _inside(rows: slice, outer: slice) -> slice:
    """`rows` counted from the start of `outer`."""
    return slice(rows.start - outer.start, rows.stop - outer.start)


class _LatentRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor, ring: _Ring) -> torch.Tensor:
        out, lse = blocks.nothing_seen(q, ring.v_width)
        for rank, flat in around(latents.reshape(-1), ring.sizes, ring.group):
            found = visible(ring.shared, rank)
            if not found:
                continue
            rows = _seen(found)
            k, v = ring.keys_values(flat.view(-1, ring.latent_width)[rows], weight)
            for block in found:
                keys = _inside(block.keys, rows)
                part = blocks.block_forward(
                    q[block.queries], k[keys], v[keys], block.segments is not None, ring.scale, ring.kernel,
                    block.segments,
                )  # fmt: skip
                blocks.merge(out[block.queries], lse[:, block.queries], *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, latents, weight, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, latents, weight, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        dq = torch.zeros_like(q, dtype=blocks.accumulation_dtype(q.dtype))
        of_weight = WeightGradient(weight, ring.owner) if ctx.needs_input_grad[2] else None
        returning = ReturningGradients(ring.sizes, ring.group, latents)
        for rank, flat in around(latents.reshape(-1), ring.sizes, ring.group):
            found = visible(ring.shared, rank)
            rows, share = slice(0, 0), None
            if found:
                rows = _seen(found)
                visited = flat.view(-1, ring.latent_width)[rows]
                share = _of_visit(ring, found, rows, visited, (grad_out, q, out, lse), weight, dq, of_weight)
            total = returning.so_far(rank)  # only now: its transfer, too, hides under the work above
            if share is not None:
                total.view(-1, ring.latent_width)[rows] += share
            returning.pass_on(rank, total)
        of_latents = returning.arrived().view(latents.shape).to(latents.dtype)
        return dq.to(q.dtype), of_latents, of_weight.result if of_weight else None, None


def _of_visit(
    ring: _Ring, found: Sequence[Block], rows: slice, visited: torch.Tensor, of_queries: tuple[torch.Tensor, ...],
    weight: torch.Tensor, dq: torch.Tensor, of_weight: WeightGradient | None,
) -> torch.Tensor:  # fmt: skip
    """The gradient of latents `visited` [b, l + r] that queries here cause; adds to `dq` and to that of the weight."""
    grad_out, q, out, lse = of_queries
    k, v = ring.keys_values(visited, weight)
    dk, dv = torch.zeros_like(k, dtype=dq.dtype), torch.zeros_like(v, dtype=dq.dtype)
    for block in found:
        at, keys = block.queries, _inside(block.keys, rows)
        dq_i, dk_i, dv_i = blocks.block_backward(
            grad_out[at], q[at], k[keys], v[keys], out[at], lse[:, at], block.segments is not None, ring.scale,
            ring.kernel, block.segments,
        )  # fmt: skip
        dq[at] += dq_i
        dk[keys] += dk_i
        dv[keys] += dv_i
    plain, rotary = dk.split((dk.shape[2] - ring.rope_width, ring.rope_width), dim=2)
    of_kv = torch.cat((plain, dv), dim=2).flatten(1).to(weight.dtype)  # [b, h (d - r + dv)]
    if of_weight is not None:
        of_weight.add(slice(None), of_kv, visited[:, : weight.shape[1]])
    return torch.cat(((of_kv @ weight).to(dq.dtype), rotary.sum(1)), dim=1)
