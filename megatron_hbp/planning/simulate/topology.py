"""The machine a plan is simulated on, and what a model weighs there: nodes, links, parameters, activations.

Ranks are laid out as Megatron-LM does it: the GPUs of a tensor-parallel group are neighbours, then come data-parallel
ranks (CP gangs and expert-parallel groups are consecutive ones), pipeline stages are outermost. A *rank* here is a
data-parallel rank as in a plan; a *device* is one pipeline stage of one rank, `tp` GPUs that do the same.
"""

from dataclasses import dataclass, replace

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import AUTO, Exchange, refusal
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.cost.model import CostModel


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Nodes, GPUs, and how the model is cut over them."""

    num_nodes: int
    gpus_per_node: int = 8
    tp: int = 1
    """Tensor parallel GPUs, inside a node."""
    pp: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Model chunks of a stage, for interleaved 1F1B; 1 is plain 1F1B."""
    ep: int = 1
    """Ranks that share the experts, consecutive data-parallel ranks."""
    overlap: float = 0.0
    """Share of a micro-batch's compute under which its exchanges can hide; the cost models' are exposed seconds: 0."""
    overlap_gradients: bool = True
    """Gradient sync runs under the last backward and the first forward of a step (not in gang plans)."""
    fully_sharded: bool = False
    """Weights and gradients are sharded too (gathers are in a micro-batch's fixed seconds), not the optimizer alone."""
    gpu_memory: float = 80e9
    """Bytes of a GPU."""
    memory_reserve: float = 4e9
    """Bytes for communicators (1 GB budgeted), CUDA context and fragmentation; an estimate."""

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node", "tp", "pp", "virtual_stages", "ep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"topology: {name} must be at least 1, got {getattr(self, name)}")
        if self.gpus_per_node % self.tp:
            raise ConfigError(
                f"topology: {self.gpus_per_node} GPUs of a node do not divide into tensor-parallel groups of {self.tp}"
                "; choose a TP that divides a node"
            )
        if self.num_gpus % (self.tp * self.pp):
            raise ConfigError(f"topology: {self.num_gpus} GPUs do not divide by TP {self.tp} x PP {self.pp}")
        if self.num_ranks % self.ep:
            raise ConfigError(f"topology: {self.num_ranks} data-parallel ranks do not divide by EP {self.ep}")
        if self.virtual_stages > 1 and self.pp == 1:
            raise ConfigError("topology: virtual stages need a pipeline; set --pp, or leave --virtual-stages out")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"topology: overlap is a share between 0 and 1, got {self.overlap}")

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.num_nodes * self.gpus_per_node

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks."""
        return self.num_gpus // (self.tp * self.pp)

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one stage that share a node's fast links."""
        return self.gpus_per_node // self.tp

    def crosses_nodes(self, num_ranks: int) -> bool:
        """Whether a group of so many consecutive ranks spans nodes."""
        return num_ranks > self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the cost model does not say of a model; all from its published configuration."""

    hidden: int
    parameters: float
    """All of them."""
    layer_bytes: float
    """Activation bytes of a token and layer that nothing recomputes: bf16, flash attention, see `dense_shape`."""
    head_bytes: float = 0.0
    """Bytes a token of logits and their gradient; 0 with a loss computed in chunks, as ours is."""
    expert_parameters: float = 0.0
    """Those of routed experts, which EP divides."""
    num_moe_layers: int = 0
    experts_per_token: int = 0
    tp_in_rates: int = 1
    """GPUs that one rank of the cost model consists of."""
    linear_rate_apart: float | None = None
    """FLOP/s in GEMMs where the expert all-to-all is priced by itself; None where the rate never held it."""


def dense_shape(hidden: int, key_value: int, feed_forward: int, parameters: float, tp_in_rates: int = 1) -> ModelShape:
    """A Llama-style layer saves two norms' and two residuals' inputs, attention out, q, k, v, gate, up, product."""
    return ModelShape(
        hidden=hidden,
        parameters=parameters,
        layer_bytes=2.0 * (5 * hidden + hidden + 2 * key_value + 3 * feed_forward),
        tp_in_rates=tp_in_rates,
    )


SHAPES = {
    "llama3.1-8b-h100": dense_shape(4096, 1024, 14336, 8.03e9),
    "llama3.1-70b-h100-tp8": dense_shape(8192, 1024, 28672, 70.6e9, tp_in_rates=8),
    "qwen2.5-32b-h100-tp4": dense_shape(5120, 1024, 27648, 32.8e9, tp_in_rates=4),
    # Layer: latents 2,112, q and k 24,576, v and attention out 16,384, five of hidden, 6 experts a token (input, gate,
    # up, product of 1,536), 2 shared. 385e12: EP 8 at 45 GB/s adds 282 us a token; both are the preset's 207e12.
    "deepseek-v2-h100": ModelShape(
        hidden=5120, parameters=236e9,
        layer_bytes=2.0 * (2112 + 2 * 24576 + 2 * 16384 + 5 * 5120 + 6 * (5120 + 3 * 1536) + 2 * 3 * 1536),
        expert_parameters=59 * 160 * 3 * 5120 * 1536.0, num_moe_layers=59, experts_per_token=6,
        linear_rate_apart=385e12,
    ),
}  # fmt: skip
"""Cost model -> shape."""


def shape_of(cost: CostModel) -> ModelShape | None:
    """The shape of the model that `cost` is of, None for one that we do not know."""
    return SHAPES.get(cost.name)


def place_cost(cost: CostModel, topology: Topology, shape: ModelShape | None) -> CostModel:
    """`cost` for ranks of this topology: its node, its tensor parallel width, its expert all-to-all apart.

    Per token, t GPUs take flops / (t rate) for GEMMs and exchange 8 hidden (t - 1) / t bytes a layer and pass
    (all-gathers and reduce-scatters before and behind attention and MLP, with sequence parallelism, three passes).
    Raises ConfigError where the model's shape is needed and unknown.
    """
    cost = replace(cost, node_size=topology.ranks_per_node)
    if shape is None:
        if topology.tp != cost.tensor_parallel:
            raise ConfigError(
                f"{cost.name} is the cost of ranks of {cost.tensor_parallel} GPUs, and its shape is unknown; set --tp "
                f"{cost.tensor_parallel}, or use a shipped model"
            )
        if topology.ep > 1:
            raise ConfigError(f"EP of {cost.name} cannot be simulated: its shape is unknown; leave --ep out")
        return cost
    if topology.ep > 1 and not shape.num_moe_layers:
        raise ConfigError(f"{cost.name} has no experts; leave --ep out")
    if topology.ep > 1 and shape.linear_rate_apart:
        cost = replace(cost, linear_rate=shape.linear_rate_apart)
    if topology.tp == shape.tp_in_rates:
        return cost
    if shape.tp_in_rates > 1:
        raise ConfigError(f"{cost.name} is the cost of ranks of {shape.tp_in_rates} GPUs; set --tp {shape.tp_in_rates}")
    t = topology.tp
    gemm = cost.linear_flops / (t * cost.linear_rate)
    collectives = 3 * cost.num_layers * 8 * shape.hidden * (t - 1) / t / cost.node_bandwidth
    return replace(
        cost,
        linear_rate=cost.linear_flops / (gemm + collectives),
        attention_rate=t * cost.attention_rate,
        node_bandwidth=t * cost.node_bandwidth,
        cluster_bandwidth=t * cost.cluster_bandwidth,
        tensor_parallel=t,
    )


def check_fit(plan: Plan, cost: CostModel, topology: Topology) -> None:
    """Raise ConfigError unless `plan` can run on `topology`."""
    ranks = topology.num_ranks
    if plan.num_ranks != ranks:
        raise ConfigError(
            f"the plan is for {plan.num_ranks} data-parallel ranks, {topology.num_gpus} GPUs / (TP {topology.tp} x "
            f"PP {topology.pp}) are {ranks}; change the topology, or `hbp plan reschedule --ranks {ranks}`"
        )
    if plan.schedule == "gang" and (topology.pp > 1 or topology.ep > 1):
        raise ConfigError("gang plans need PP 1 and EP 1; plan with --schedule lockstep")
    chunks = topology.pp * topology.virtual_stages
    if cost.num_layers % chunks:
        raise ConfigError(f"{cost.num_layers} layers do not divide into {chunks} chunks (PP x virtual stages)")
    if topology.virtual_stages > 1 and (plan.num_micro_batches % topology.pp).any():
        raise ConfigError(
            f"interleaved stages want micro-batches in multiples of PP {topology.pp}, step "
            f"{int((plan.num_micro_batches % topology.pp > 0).argmax())} has others; "
            f"plan with --slot-multiple {topology.pp}"
        )


def check_exchanges(plan: Plan, placed: CostModel) -> None:
    """Raise ConfigError unless the heads of a rank (`placed` knows its TP) allow each tier's exchange."""
    if placed.attention is None:
        return
    shape = placed.attention.on_tensor_parallel_rank(placed.tensor_parallel)
    for tier in plan.tiers:
        kind: Exchange = "a2a" if tier.exchange == AUTO else tier.exchange  # as it is priced
        if tier.cp_degree > 1 and (why := refusal(kind, shape, tier.cp_degree)):
            raise ConfigError(
                f"tier {tier} cannot exchange by {kind} at TP {placed.tensor_parallel}: {why}; plan with a smaller CP "
                "degree, or name another exchange in the tier (exchange=all_gather)"
            )


def parameters_of_gpu(shape: ModelShape, topology: Topology) -> tuple[float, float]:
    """Parameters on one GPU, (all but routed experts, routed experts), were they cut evenly over stages."""
    cut = topology.tp * topology.pp
    return (shape.parameters - shape.expert_parameters) / cut, shape.expert_parameters / (cut * topology.ep)


def gradient_sync(shape: ModelShape | None, cost: CostModel, topology: Topology) -> tuple[float, float]:
    """Seconds of a step's (reduce-scatter of gradients in fp32, all-gather of parameters in bf16), before overlap.

    Each GPU sends its own share, so that a rank's bandwidth divides by TP. Experts are reduced over ranks / EP.
    """
    if shape is None or topology.fully_sharded:
        return 0.0, 0.0
    bandwidth = cost.cluster_bandwidth if topology.crosses_nodes(topology.num_ranks) else cost.node_bandwidth
    groups = (topology.num_ranks, topology.num_ranks // topology.ep)
    held = parameters_of_gpu(shape, topology)
    moved = sum(count * (size - 1) / size for count, size in zip(held, groups, strict=True))
    per_byte = moved * topology.tp / bandwidth
    return 4 * per_byte, 2 * per_byte
