"""Where the seconds of a pack go: compute, CP exchange, expert all-to-all; forward and backward.

Everything is read off the cost model's coefficients (`tier_cost`), so that whatever it prices is priced the same here:
the exchange is what an infinite bandwidth would save, the forward is what nothing recomputed says it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.planning.core.exchanges import planned
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.tiers import Recompute, Tier
from megatron_hbp.planning.cost.model import CostModel


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Seconds of each pack on its gang, every field float64 [packs], for the whole depth of the model."""

    compute: np.ndarray
    """GEMMs, attention and the micro-batch's fixed seconds."""
    exchange: np.ndarray
    """Exposed seconds of the CP exchange."""
    expert: np.ndarray
    """Exposed seconds of the expert all-to-all."""
    contention: np.ndarray
    """The part of exchange and expert that exists only because both use the same links."""
    forward: np.ndarray
    """The part of all of it that the forward pass takes."""

    @property
    def total(self) -> np.ndarray:
        """Seconds of the pack."""
        return self.compute + self.exchange + self.expert


def break_down(
    tiers: Sequence[Tier],
    pack_tier: np.ndarray,
    tokens: np.ndarray,
    squares: np.ndarray,
    *,
    cost: CostModel,
    topology: Topology,
    overlap: float = 0.0,
) -> Breakdown:
    """Split the seconds of packs; `pack_tier`, `tokens` and `squares` are [packs].

    Traffic hides under a share `overlap` of the compute. Two exchanges on one kind of link share that window; on
    different links each has it for itself.
    """
    rows = np.array([_coefficients(tier, cost, topology) for tier in tiers])[pack_tier]
    fixed, per_token, per_square, exchange, expert, crosses = rows[:, :6].T
    forward_fixed, forward_token, forward_square, forward_exchange, forward_expert = rows[:, 6:].T
    compute = fixed + per_token * tokens + per_square * squares
    exchange, expert = exchange * tokens, expert * tokens
    window = overlap * compute
    together = np.maximum(exchange + expert - window, 0.0)
    apart = np.maximum(exchange - window, 0.0) + np.maximum(expert - window, 0.0)
    same_link = crosses == topology.crosses_nodes(topology.ep)
    exposed_share = np.where(same_link, together, apart) / np.maximum(exchange + expert, 1e-30)
    by_exchange = np.where(same_link, exchange * exposed_share, np.maximum(exchange - window, 0.0))
    by_expert = np.where(same_link, expert * exposed_share, np.maximum(expert - window, 0.0))
    forward_sent = (forward_exchange + forward_expert) * tokens * exposed_share
    return Breakdown(
        compute=compute,
        exchange=by_exchange,
        expert=by_expert,
        contention=np.where(same_link, together - apart, 0.0),
        forward=forward_fixed + forward_token * tokens + forward_square * squares + forward_sent,
    )


def expert_seconds(tier: Tier, cost: CostModel, topology: Topology) -> tuple[float, float]:
    """Seconds per token of the pack of dispatching to experts and combining, (in all, in the forward).

    Each of `experts_per_token` copies of a token's hidden state goes out and comes back in bf16, in the forward, in the
    backward, and again where the layer is recomputed; 1 / EP of them stay where they are.
    """
    if topology.ep == 1:
        return 0.0, 0.0
    links, model = cost.rank, cost.model
    bandwidth = links.cluster_bandwidth if topology.crosses_nodes(topology.ep) else links.node_bandwidth
    sent = 2 * model.experts_per_token * model.hidden * 2 * (topology.ep - 1) / topology.ep
    forward = model.num_moe_layers * sent / bandwidth / tier.cp_degree
    return forward * (2 + recomputed_share(tier.recompute, cost.num_layers)), forward


def recomputed_share(recompute: Recompute, num_layers: int) -> float:
    """Share of layers whose experts run again in the backward pass."""
    return 1.0 if "moe" in recompute.modules else recompute.share_of_layers(num_layers)


def _coefficients(tier: Tier, cost: CostModel, topology: Topology) -> tuple[float, ...]:
    """(fixed, per token, per square, exchange, expert, crosses nodes) and the forward's part of the first five."""
    instant = cost.without_exchange()
    plain = replace(tier, recompute=Recompute())
    full, silent = cost.tier_cost(tier), instant.tier_cost(tier)
    kept, kept_silent = cost.tier_cost(plain), instant.tier_cost(plain)
    expert, forward_expert = expert_seconds(tier, cost, topology)
    backward = planned(tier.exchange, cost.rank_attention, tier.cp_degree).backward_bytes
    crosses = float(topology.crosses_nodes(tier.cp_degree))
    whole = (silent.fixed, silent.per_token, silent.per_square, full.per_token - silent.per_token, expert, crosses)
    # Of three GEMM passes and 3.5 of attention, one each is the forward; a ring sends more in the backward.
    forward = (
        kept_silent.fixed / 3,
        kept_silent.per_token / 3,
        kept_silent.per_square / 3.5,
        (kept.per_token - kept_silent.per_token) / (1 + backward),
        forward_expert,
    )
    return whole + forward
