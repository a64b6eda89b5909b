"""What fits into a GPU's memory: one answer for `hbp plan`, `--auto`, `hbp simulate` and the peers.

Two sources. A *measured* table (`CostModel.recompute_layers`: of a profile, of the paper, of --memory) says how many
layers must be recomputed at so many local tokens. An *estimate* from the model's shapes: bf16 weights, fp32 gradients,
Adam's 12 bytes per parameter sharded over the data-parallel ranks (all 18 bytes where everything is sharded),
activations in bf16 with flash attention, a recomputed layer keeping its input alone, one layer's activations while it
is recomputed, logits in chunks, and a reserve. A table of this very layout is believed; one of more ranks must agree
with the estimate, as fewer ranks hold more optimizer state each.
"""

from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.model import ModelSpec
from megatron_hbp.planning.core.pipeline import stage_orders
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.tiers import Tier, full_layers
from megatron_hbp.planning.cost.model import CostModel, MemoryTable, least_recompute

LOCAL_TOKENS = tuple(1 << k for k in range(10, 21))
"""Where the estimate is tabulated."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest GPU under a plan, and where it is."""

    states: float
    """Weights, gradients, optimizer."""
    activations: float
    """The worst window of micro-batches in flight, with one recomputed layer."""
    reserve: float
    limit: float
    """What a GPU has."""
    stage: int
    step: int
    rank: int

    @property
    def peak(self) -> float:
        """Bytes of all three."""
        return self.states + self.activations + self.reserve

    @property
    def headroom(self) -> float:
        """Bytes left; negative where the plan does not fit."""
        return self.limit - self.peak


def fitted(cost: CostModel, topology: Topology, measured: MemoryTable = ()) -> CostModel:
    """`cost` whose memory table holds for `topology`; `measured` replaces what it knows.

    Raises ConfigError where not even full recompute fits.
    """
    if measured:
        return replace(cost, recompute_layers=measured, recompute_ranks=0)
    table = cost.recompute_layers
    if table and cost.recompute_ranks <= topology.num_ranks:
        return cost
    found: list[tuple[int, int]] = []
    for local in [tokens for tokens, _ in table] or LOCAL_TOKENS:
        known = least_recompute(table, local)
        count = _fewest_layers(cost, topology, local, at_least=known.num_layers if known else 0)
        if count is not None:
            found.append((local, count))
    if not found:
        raise ConfigError(
            f"{cost.model.name} does not fit {topology.num_gpus} GPUs of {cost.machine.memory / 1e9:.0f} GB: weights, "
            f"gradients and optimizer take {state_bytes(cost.model, topology) / 1e9:.0f} GB of each; use more ranks, "
            "--tp, --pp or --ep, or say what fits with --memory LOCAL_TOKENS:LAYERS,..."
        )
    return replace(cost, recompute_layers=tuple(found), recompute_ranks=topology.num_ranks)


def _fewest_layers(cost: CostModel, topology: Topology, local_tokens: int, *, at_least: int) -> int | None:
    """The fewest recomputed layers with which a micro-batch fits by the estimate; None where all are too few."""
    room = cost.machine.memory - cost.machine.memory_reserve - state_bytes(cost.model, topology)
    for count in range(at_least, cost.num_layers + 1):
        tier = Tier(packing_length=local_tokens, recompute=full_layers(count))
        if local_tokens / topology.tp * sum(token_bytes(tier, cost.model)) <= room:
            return count
    return None


def problem(plan: Plan, cost: CostModel, topology: Topology) -> str:
    """Why `plan` does not fit, in one line; empty where it does. `cost` is `fitted` to `topology`."""
    for index in np.unique(plan.pack_tier).tolist():
        tier = plan.tiers[index]
        if not cost.recompute_layers or tier.recompute.granularity == "selective":
            continue
        needed = least_recompute(cost.recompute_layers, tier.local_tokens)
        if needed is None:
            most = max(local for local, _ in cost.recompute_layers)
            return f"tier {tier} keeps {tier.local_tokens} tokens on a rank, at most {most} fit; raise its CP degree"
        if needed.num_layers > tier.recompute.num_layers:
            return f"tier {tier} needs {needed} to fit; write it into the tier, or raise its CP degree"
    if cost.recompute_layers and not cost.recompute_ranks:
        return ""
    memory = memory_of(plan, cost, topology)
    if memory.headroom >= 0:
        return ""
    return (
        f"{-memory.headroom / 1e9:.1f} GB are missing on {topology.num_gpus} GPUs of {memory.limit / 1e9:.0f} GB "
        f"(states {memory.states / 1e9:.1f}, activations {memory.activations / 1e9:.1f}, reserve "
        f"{memory.reserve / 1e9:.1f} GB); use more ranks, --tp, --pp, recompute or a higher CP degree"
    )


def memory_of(plan: Plan, cost: CostModel, topology: Topology) -> Memory:
    """The estimate for the fullest GPU of all steps, ranks and stages. Local tokens are the real ones of each pack."""
    kept_bytes, rebuilt_bytes = np.array([token_bytes(tier, cost.model) for tier in plan.tiers]).T
    local = np.ceil(plan.pack_tokens / plan.pack_cp) / topology.tp
    kept, rebuilt = local * kept_bytes[plan.pack_tier], local * rebuilt_bytes[plan.pack_tier]
    worst = (-1.0, 0, 0, 0)
    for count in np.unique(plan.num_micro_batches):
        steps = np.flatnonzero(plan.num_micro_batches == count)
        grid = plan.grid[steps, :count]
        held = np.where(grid >= 0, kept[grid], 0.0)
        extra = np.where(grid >= 0, rebuilt[grid], 0.0).max(axis=1)
        for stage in range(topology.pp):
            peaks = in_flight(held, stage=stage, num_stages=topology.pp, num_chunks=topology.virtual_stages) + extra
            step, rank = np.unravel_index(peaks.argmax(), peaks.shape)
            worst = max(worst, (float(peaks[step, rank]), stage, int(steps[step]), int(rank)))
    activations, stage, step_index, rank_index = worst
    return Memory(
        states=state_bytes(cost.model, topology), activations=activations, reserve=cost.machine.memory_reserve,
        limit=cost.machine.memory, stage=stage, step=step_index, rank=rank_index,
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


def token_bytes(tier: Tier, model: ModelSpec) -> tuple[float, float]:
    """Bytes per local token of `tier`: (kept from forward to backward over the whole depth, rebuilt at a time).

    Shapes do not tell what a module keeps: recompute of modules counts as saving nothing, and one layer bounds what it
    rebuilds.
    """
    share = tier.recompute.share_of_layers(model.num_layers)
    kept_input = 2.0 * model.hidden * model.num_layers
    rebuilt = float(model.largest_layer_bytes) if tier.recompute.granularity else 0.0
    return (1 - share) * model.activation_bytes + share * kept_input, rebuilt


def state_bytes(model: ModelSpec, topology: Topology) -> float:
    """Bytes of weights, gradients and optimizer on one GPU, if they were cut evenly over stages."""
    groups = (topology.num_ranks, topology.num_ranks // topology.ep)
    whole, divided = (0, 18) if topology.fully_sharded else (6, 12)
    held = parameters_of_gpu(model, topology)
    return sum(count * (whole + divided / group) for count, group in zip(held, groups, strict=True))


def parameters_of_gpu(model: ModelSpec, topology: Topology) -> tuple[float, float]:
    """Parameters on one GPU, (all but routed experts, routed experts), if they were cut evenly over stages."""
    cut = topology.tp * topology.pp
    return (model.parameters - model.expert_parameters) / cut, model.expert_parameters / (cut * topology.ep)
