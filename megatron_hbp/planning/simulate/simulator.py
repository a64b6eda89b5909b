"""Run a plan on a machine that is not there: how long an epoch takes, and what the GPUs wait for.

    plan, cost model, topology -> seconds of every pack -> slots -> pipeline -> steps -> epoch

In lockstep every slot is a barrier of all ranks (experts, sharded parameters): it takes as long as its slowest pack,
and the pipeline runs on those times. In a gang plan a pack starts when its gang's ranks are free, and ranks meet once a
step.
Then, for every rank and stage, exactly:

    step = compute + exchange + expert all-to-all + imbalance + pipeline bubble + gradient sync + optimizer
"""

from dataclasses import dataclass

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.pipeline import makespan
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.memory import Memory, memory_of
from megatron_hbp.planning.cost.model import CostModel
from megatron_hbp.planning.measure.metrics import rank_grid
from megatron_hbp.planning.simulate.breakdown import Breakdown, break_down
from megatron_hbp.planning.simulate.placement import (
    check_exchanges,
    check_fit,
    gradient_sync,
    place_cost,
    with_experts_apart,
)

CAUSES = ("imbalance", "exchange", "expert all-to-all", "pipeline bubble", "gradient sync", "optimizer")
"""What a GPU does when it does not compute."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Seconds by step, rank and cause. A stage's devices share the rank's columns: stages hold equal parts."""

    topology: Topology
    cost: CostModel
    """As placed on the topology."""
    packs: Breakdown
    wall: np.ndarray
    """float64 [steps]."""
    compute: np.ndarray
    """float64 [steps, ranks], of one stage, like all that follow."""
    exchange: np.ndarray
    expert: np.ndarray
    imbalance: np.ndarray
    bubble: np.ndarray
    """float64 [steps]."""
    sync: np.ndarray
    """float64 [steps]: exposed seconds of the gradient sync."""
    hops: np.ndarray
    """float64 [slots of all steps]: seconds from a stage to the next."""
    contention_seconds: float
    """Rank-seconds, of one stage, that CP and EP cost each other on the links they share."""
    num_tokens: int
    memory: Memory | None
    """None where the machine's memory is not known."""

    @property
    def epoch_seconds(self) -> float:
        """Wall seconds of the plan."""
        return float(self.wall.sum())

    @property
    def gpu_days(self) -> float:
        """Days of one GPU."""
        return self.epoch_seconds * self.topology.num_gpus / 86400

    @property
    def tokens_per_gpu_second(self) -> float:
        """Real tokens per second and GPU."""
        return self.num_tokens / self.epoch_seconds / self.topology.num_gpus

    def hop(self, plan: Plan, step: int) -> np.ndarray:
        """Seconds [1, slots of the step] that activations take from a stage to the next."""
        end = int(plan.num_micro_batches[: step + 1].sum())
        return self.hops[None, end - int(plan.num_micro_batches[step]) : end]

    def idle(self) -> dict[str, float]:
        """Share of all GPU-seconds that goes to each of CAUSES."""
        steps, ranks = self.compute.shape
        total = self.epoch_seconds
        seconds = {
            "imbalance": self.imbalance.sum() / ranks,
            "exchange": self.exchange.sum() / ranks,
            "expert all-to-all": self.expert.sum() / ranks,
            "pipeline bubble": self.bubble.sum(),
            "gradient sync": self.sync.sum(),
            "optimizer": steps * self.cost.step_seconds,
        }
        return {cause: float(seconds[cause] / total) for cause in CAUSES}

    def by_rank(self) -> dict[str, np.ndarray]:
        """Seconds of the epoch by cause, and of computing, float64 [ranks] each; they sum to the epoch."""
        ranks = self.compute.shape[1]
        same = {"pipeline bubble": self.bubble.sum(), "gradient sync": self.sync.sum()}
        same["optimizer"] = len(self.wall) * self.cost.step_seconds
        own = {"compute": self.compute, "imbalance": self.imbalance, "exchange": self.exchange}
        own["expert all-to-all"] = self.expert
        return {name: grid.sum(axis=0) for name, grid in own.items()} | {
            name: np.full(ranks, seconds) for name, seconds in same.items()
        }


def simulate(
    plan: Plan, cost: CostModel, topology: Topology, *, overlap: float = 0.0, overlap_gradients: bool = True
) -> Simulation:
    """Simulate an epoch. Raises ConfigError for what cannot run.

    Exchanges hide under a share `overlap` of a micro-batch's compute (the presets' rates are those of exposed seconds:
    0). With `overlap_gradients` the gradient sync runs under the last backward and the first forward of a step, but
    not in gang plans, where ranks issue their collectives in different orders.
    """
    if not 0 <= overlap <= 1:
        raise ConfigError(f"the overlap is a share between 0 and 1, got {overlap}")
    check_fit(plan, cost, topology)
    placed = place_cost(with_experts_apart(cost, topology), topology)
    check_exchanges(plan, placed)
    packs = break_down(
        plan.tiers, plan.pack_tier, plan.pack_tokens, plan.pack_squares, cost=placed, topology=topology, overlap=overlap
    )
    busy = rank_grid(plan, packs.total)
    hop = _hop_seconds(plan, placed, topology)
    starts = np.cumsum(plan.num_micro_batches) - plan.num_micro_batches
    own = {name: _by_step(plan, getattr(packs, name), starts) for name in ("compute", "exchange", "expert")}
    if plan.schedule == "gang":
        run = gang_seconds(plan, packs.total)
        slots = run
        ends = (np.zeros(plan.num_steps), np.zeros(plan.num_steps))
    else:
        slot = np.maximum(busy.max(axis=1), placed.micro_batch_seconds)  # of dummies alone
        forward = rank_grid(plan, packs.forward)[np.arange(len(busy)), busy.argmax(axis=1)]
        run = _pipeline_seconds(plan, topology, forward, slot - forward, hop, starts)
        slots = np.add.reduceat(forward + (slot - forward), starts)
        last = starts + plan.num_micro_batches - 1
        ends = (slot - forward)[last] / topology.pp, forward[starts] / topology.pp
    reduce, gather = gradient_sync(placed, topology)
    hidden = ends if overlap_gradients else (0.0, 0.0)
    sync = np.maximum(reduce - hidden[0], 0.0) + np.maximum(gather - hidden[1], 0.0) + np.zeros(plan.num_steps)
    stages = topology.pp
    return Simulation(
        topology=topology,
        cost=placed,
        packs=packs,
        wall=run + sync + placed.step_seconds,
        **{name: grid / stages for name, grid in own.items()},
        imbalance=(slots[:, None] - sum(own.values())) / stages,
        bubble=run - slots / stages,
        sync=sync,
        hops=hop,
        contention_seconds=float(packs.contention @ plan.pack_cp) / stages,
        num_tokens=int(plan.pack_tokens.sum()),
        memory=memory_of(plan, placed, topology) if np.isfinite(cost.machine.memory) else None,
    )


def gang_seconds(plan: Plan, seconds: np.ndarray) -> np.ndarray:
    """Seconds of each step, [steps], where a pack (`seconds` [packs]) starts as soon as all its ranks are free."""
    return gang_ends(plan, seconds)[1].max(axis=1)


def gang_ends(plan: Plan, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(when each pack starts in its step [packs], when each rank is done [steps, ranks])."""
    free = np.zeros((plan.num_steps, plan.num_ranks))
    starts = np.zeros(plan.num_packs)
    for slot in range(plan.max_micro_batches):
        packs = plan.grid[:, slot]
        used = packs >= 0
        np.maximum.at(starts, packs[used], free[used])
        free[used] = (starts + seconds)[packs[used]]
    return starts, free


def _by_step(plan: Plan, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums [steps, ranks] of per-pack `values` over the slots of each step."""
    return np.add.reduceat(rank_grid(plan, values), starts, axis=0)


def _hop_seconds(plan: Plan, cost: CostModel, topology: Topology) -> np.ndarray:
    """Seconds [slots] that a slot's activations take to the next stage, bf16; stages lie in different nodes."""
    if topology.pp == 1:
        return np.zeros(int(plan.num_micro_batches.sum()))
    local = rank_grid(plan, plan.pack_tokens / plan.pack_cp).max(axis=1)
    return local * cost.model.hidden * 2 / cost.rank.cluster_bandwidth


def _pipeline_seconds(
    plan: Plan, topology: Topology, forward: np.ndarray, backward: np.ndarray, hop: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Seconds of each step, [steps]; steps with equally many slots are run at once."""
    if topology.pp == 1:
        return np.add.reduceat(forward + backward, starts)
    seconds = np.empty(plan.num_steps)
    for count in np.unique(plan.num_micro_batches):
        steps = np.flatnonzero(plan.num_micro_batches == count)
        slots = starts[steps, None] + np.arange(count)
        seconds[steps] = makespan(
            forward[slots], backward[slots], num_stages=topology.pp, num_chunks=topology.virtual_stages, hop=hop[slots]
        )
    return seconds
