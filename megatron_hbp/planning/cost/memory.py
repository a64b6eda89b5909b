"""The most memory a GPU needs under a plan: weights, and the worst window of micro-batches of mixed tiers in flight.

An estimate from shapes, not a measurement: bf16 weights, fp32 gradients, Adam's 12 bytes a parameter sharded over the
data-parallel ranks (all 18 bytes where everything is sharded), activations by `ModelShape.layer_bytes`, a recomputed
layer keeping its input alone, one layer's activations while it is recomputed, and a reserve.
"""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.planning.core.pipeline import stage_orders
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Tier
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.simulate.topology import ModelShape, Topology, parameters_of_gpu


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest GPU, and where it is."""

    states: float
    """Weights, gradients, optimizer."""
    activations: float
    """The worst window in flight, with one recomputed layer and the logits."""
    reserve: float
    limit: float
    """What a GPU has."""
    stage: int
    step: int
    rank: int

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return self.states + self.activations + self.reserve

    @property
    def headroom(self) -> float:
        """Bytes left; negative where the plan does not fit."""
        return self.limit - self.peak


def memory_of(plan: Plan, cost: CostModel, shape: ModelShape, topology: Topology) -> Memory:
    """The fullest GPU of all steps, ranks and stages. Local tokens are the real ones of each pack."""
    per_token = np.array([token_bytes(tier, cost, shape) for tier in plan.tiers])[plan.pack_tier]
    local = np.ceil(plan.pack_tokens / plan.pack_cp) / topology.tp
    kept, head = local * per_token, local * shape.head_bytes
    # A selective recompute rebuilds less than a layer; one layer bounds it.
    rebuilt = np.array([shape.layer_bytes if tier.recompute.granularity else 0.0 for tier in plan.tiers])[
        plan.pack_tier
    ]
    rebuilt = local * rebuilt
    worst = (-1.0, 0, 0, 0)
    for count in np.unique(plan.num_micro_batches):
        steps = np.flatnonzero(plan.num_micro_batches == count)
        grid = plan.grid[steps, :count]
        held = np.where(grid >= 0, kept[grid], 0.0)
        extra = np.where(grid >= 0, (rebuilt + head)[grid], 0.0).max(axis=1)
        for stage in range(topology.pp):
            last = stage == topology.pp - 1
            other = extra if last else np.where(grid >= 0, rebuilt[grid], 0.0).max(axis=1)
            peaks = in_flight(held, stage=stage, num_stages=topology.pp, num_chunks=topology.virtual_stages) + other
            step, rank = np.unravel_index(peaks.argmax(), peaks.shape)
            worst = max(worst, (float(peaks[step, rank]), stage, int(steps[step]), int(rank)))
    activations, stage, step_index, rank_index = worst
    return Memory(
        states=state_bytes(shape, topology), activations=activations, reserve=topology.memory_reserve,
        limit=topology.gpu_memory, stage=stage, step=step_index, rank=rank_index,
    )  # fmt: skip


def in_flight(held: np.ndarray, *, stage: int, num_stages: int, num_chunks: int = 1) -> np.ndarray:
    """The most that a stage holds at once, [n, ranks]; `held` [n, m, ranks] is what a micro-batch keeps in all stages.

    A micro-batch's share (1 of p v) is held from its forward to the end of its backward, chunk by chunk.
    """
    if num_stages == 1:
        return held.max(axis=1)
    share = held / (num_stages * num_chunks)
    now = np.zeros((held.shape[0], held.shape[2]))
    most = now.copy()
    for backward, _, batch in stage_orders(num_stages, held.shape[1], num_chunks)[stage]:
        if backward:
            now -= share[:, batch]
        else:
            now += share[:, batch]
            np.maximum(most, now, out=most)
    return most


def token_bytes(tier: Tier, cost: CostModel, shape: ModelShape) -> float:
    """Bytes that a local token of `tier` keeps from forward to backward over the whole depth.

    Shapes do not tell what a module keeps: recompute of modules counts as saving nothing.
    """
    share = tier.recompute.share_of_layers(cost.num_layers)
    kept_input = 2.0 * shape.hidden
    per_layer = (1 - share) * shape.layer_bytes + share * kept_input
    return cost.num_layers * per_layer


def state_bytes(shape: ModelShape, topology: Topology) -> float:
    """Bytes of weights, gradients and optimizer on one GPU."""
    groups = (topology.num_ranks, topology.num_ranks // topology.ep)
    whole, divided = (0, 18) if topology.fully_sharded else (6, 12)
    held = parameters_of_gpu(shape, topology)
    return sum(count * (whole + divided / group) for count, group in zip(held, groups, strict=True))
