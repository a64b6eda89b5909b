"""A cost model and a plan on a topology: what they become there, and what is refused."""

from dataclasses import replace

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import AUTO, EXCHANGES
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.memory import parameters_of_gpu
from megatron_hbp.planning.cost.model import CostModel


def place_cost(cost: CostModel, topology: Topology) -> CostModel:
    """`cost` for ranks of this topology: its nodes, its tensor-parallel width.

    Per token, t GPUs take flops / (t rate) for GEMMs and exchange 8 hidden (t - 1) / t bytes per layer and pass
    (all-gathers and reduce-scatters before and behind attention and MLP, with sequence parallelism, three passes).
    Raises ConfigError where rates of several GPUs are those of another width.
    """
    cost = cost.with_machine(node_size=topology.gpus_per_node)
    t = topology.tp
    if t == cost.tensor_parallel:
        return cost
    if cost.tensor_parallel > 1:
        raise ConfigError(
            f"{cost.name} is the cost of ranks of {cost.tensor_parallel} GPUs; set --tp {cost.tensor_parallel}"
        )
    gemm = cost.linear_flops / cost.machine.linear_rate / t
    collectives = 3 * cost.num_layers * 8 * cost.model.hidden * (t - 1) / t / cost.machine.node_bandwidth
    placed = cost.with_machine(linear_rate=cost.linear_flops / (gemm + collectives) / t)
    return replace(placed, tensor_parallel=t)


def with_experts_apart(cost: CostModel, topology: Topology) -> CostModel:
    """`cost` without the expert all-to-all that its GEMM rate may hold, which is then priced by itself."""
    if topology.ep == 1:
        return cost
    if not cost.model.num_moe_layers:
        raise ConfigError(f"{cost.name} has no experts; leave --ep out")
    rate = cost.linear_rate_without_experts
    return cost.with_machine(linear_rate=rate) if rate else cost


def check_fit(plan: Plan, cost: CostModel, topology: Topology) -> None:
    """Raise ConfigError unless `plan` can run on `topology`."""
    ranks = topology.num_ranks
    if plan.num_ranks != ranks:
        raise ConfigError(
            f"the plan is for {plan.num_ranks} data-parallel ranks, {topology.num_gpus} GPUs / (TP {topology.tp} x "
            f"PP {topology.pp}) are {ranks}; change the topology, or `hbp plan reschedule --ranks {ranks}`"
        )
    if plan.schedule == "gang" and (topology.pp > 1 or topology.ep > 1):
        raise ConfigError("gang plans require PP 1 and EP 1; plan with --schedule lockstep")
    chunks = topology.pp * topology.virtual_stages
    if cost.num_layers % chunks:
        raise ConfigError(f"{cost.num_layers} layers do not divide into {chunks} chunks (PP x virtual stages)")
    if topology.virtual_stages > 1 and (plan.num_micro_batches % topology.pp).any():
        raise ConfigError(
            f"interleaved stages require micro-batches in multiples of PP {topology.pp}, step "
            f"{int((plan.num_micro_batches % topology.pp > 0).argmax())} has others; "
            f"plan with --slot-multiple {topology.pp}"
        )


def check_exchanges(plan: Plan, placed: CostModel) -> None:
    """Raise ConfigError unless the heads of a rank (`placed` knows its TP) allow the exchange that each tier names."""
    for tier in plan.tiers:
        if tier.cp_degree == 1 or tier.exchange == AUTO:
            continue
        if why := EXCHANGES[tier.exchange].refusal(placed.rank_attention, tier.cp_degree):
            raise ConfigError(
                f"tier {tier} cannot exchange by {tier.exchange} at TP {placed.tensor_parallel}: {why}; plan with a "
                "smaller CP degree, or name another exchange in the tier (exchange=all_gather)"
            )


def gradient_sync(cost: CostModel, topology: Topology) -> tuple[float, float]:
    """Seconds of a step's (reduce-scatter of gradients in fp32, all-gather of parameters in bf16), before overlap.

    Each GPU sends its own share over its own links. Experts are reduced over ranks / EP.
    """
    if topology.fully_sharded:
        return 0.0, 0.0
    machine = cost.machine
    bandwidth = machine.cluster_bandwidth if topology.crosses_nodes(topology.num_ranks) else machine.node_bandwidth
    groups = (topology.num_ranks, topology.num_ranks // topology.ep)
    held = parameters_of_gpu(cost.model, topology)
    per_byte = sum(count * (size - 1) / size for count, size in zip(held, groups, strict=True)) / bandwidth
    return 4 * per_byte, 2 * per_byte
