"""qkv_latent, MLA's latents of all tokens to every rank, which up-projects its own heads: no extra FLOPs.

Latents of queries, keys and values are gathered; each rank attends with h / c heads over all x tokens, and heads turn
into sequence on the way back. Legend as in model/latents.py.
"""

from typing import Any

import torch
import torch.distributed as dist

from megatron_hbp.errors import ConfigError
from megatron_hbp.model.exchange.a2a import heads_to_sequence
from megatron_hbp.model.exchange.collectives import all_gather_rows
from megatron_hbp.model.kernels import Kernel
from megatron_hbp.model.split import Shared, Split, rows_at


def gather(q_latent: torch.Tensor, kv_latent: torch.Tensor, split: Split, group: dist.ProcessGroup) -> torch.Tensor:
    """[s, q], [s, l + r] -> latents of the shared samples on all ranks, [x, q + l + r], in the order of the pack."""
    shared = split.shared
    assert shared is not None
    rows = rows_at(torch.cat((q_latent, kv_latent), dim=1), split.shared_at)
    return rows_at(all_gather_rows(rows, shared.counts, group), shared.to_pack)


def project(
    up: Any, gathered: torch.Tensor, w_q: torch.Tensor, w_kv: torch.Tensor, shared: Shared, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """[x, q + l + r] -> q, k [x, h / c, d], v [x, h / c, dv] of this rank's heads."""
    num_heads, left = divmod(up.num_heads, len(shared.counts))
    if left:
        raise ConfigError(
            f"exchange=qkv_latent: CP degree {len(shared.counts)} does not divide the {up.num_heads} heads of a rank; "
            "use kv_latent or p2p"
        )
    heads = own_heads(num_heads, dist.get_rank(group))
    q_latent, kv_latent = gathered.split((w_q.shape[1], up.kv_latent + up.rope_width), dim=1)
    return up.queries(q_latent, w_q, heads, query_positions(shared)), *up.keys_values(kv_latent, w_kv, heads)


def attend(
    up: Any, projected: tuple[torch.Tensor, ...], kv_latent: torch.Tensor, w_kv: torch.Tensor, kernel: Kernel,
    scale: float, split: Split, group: dist.ProcessGroup,
) -> torch.Tensor:  # fmt: skip
    """[x_r, h, dv] from the first three of `projected`."""
    assert split.shared is not None
    q, k, v = projected[:3]
    return heads_to_sequence(kernel(q, k, v, split.shared.segments, scale), split.shared, group)


def own_heads(num_heads: int, cp_rank: int) -> range:
    """The `num_heads` heads of a CP rank."""
    return range(cp_rank * num_heads, (cp_rank + 1) * num_heads)


def query_positions(shared: Shared) -> torch.Tensor:
    """int64 [x]: what the queries of all shared tokens are rotated by."""
    return shared.positions
