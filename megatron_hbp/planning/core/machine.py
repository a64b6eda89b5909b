"""A machine, described once (device, links, nodes), and how a model is cut over it.

Ranks are laid out as Megatron-LM does it: the GPUs of a tensor-parallel group are neighbours, then come data-parallel
ranks (CP gangs and expert-parallel groups are consecutive ones), pipeline stages are outermost. A *rank* is a
data-parallel rank, as in a plan; `tp` GPUs on each of `pp` stages do its work.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_hbp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds and sizes of one GPU and its links; of a rank of several GPUs after `of_ranks`."""

    name: str
    linear_rate: float
    """FLOP/s reached in GEMMs."""
    attention_rate: float
    """FLOP/s reached in attention."""
    node_bandwidth: float
    """Bytes/s received inside a node."""
    cluster_bandwidth: float
    """Bytes/s received from other nodes."""
    node_size: int = 8
    """GPUs of a node; ranks of a node after `of_ranks`."""
    memory: float = 80e9
    """Bytes of device memory."""
    memory_reserve: float = 4e9
    """Bytes kept for communicators (1 GB budgeted), CUDA context and fragmentation; an estimate."""
    memory_bandwidth: float = 3e12
    """Bytes/s of device memory."""
    overlap: float = 0.8
    """Share of a ring's transfer that attention can hide: its copies use some of the same cores and memory."""

    def bandwidth(self, num_ranks: int) -> float:
        """Bytes/s in a group of consecutive ranks: its slowest link decides."""
        return self.node_bandwidth if num_ranks <= self.node_size else self.cluster_bandwidth

    def of_ranks(self, tp: int) -> "Machine":
        """The machine as ranks of `tp` GPUs see it: `tp` times as fast, links of all their GPUs."""
        if tp == 1:
            return self
        rates = ("linear_rate", "attention_rate", "node_bandwidth", "cluster_bandwidth", "memory_bandwidth")
        faster = {name: tp * getattr(self, name) for name in rates}
        return replace(self, node_size=max(1, self.node_size // tp), **faster)


H100 = Machine(
    name="h100", linear_rate=515e12, attention_rate=308e12, node_bandwidth=129e9, cluster_bandwidth=45e9
)  # fmt: skip
"""80 GB, 8 in a node; rates and links fitted by hand to tables 4, 18 and 19 of the paper (arXiv 2503.07680)."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Nodes, GPUs, and how the model is cut over them."""

    num_nodes: int
    gpus_per_node: int = 8
    tp: int = 1
    """Tensor-parallel GPUs, inside a node."""
    pp: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Model chunks of a stage, for interleaved 1F1B; 1 is plain 1F1B."""
    ep: int = 1
    """Ranks that share the experts, consecutive data-parallel ranks."""
    fully_sharded: bool = False
    """Weights and gradients are sharded too (gathers are in a micro-batch's fixed seconds), not the optimizer alone."""

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

    @staticmethod
    def of_ranks(num_ranks: int, *, gpus_per_node: int = 8, tp: int = 1, pp: int = 1, **cut: Any) -> "Topology":
        """The topology of so many data-parallel ranks; a node holds fewer GPUs where the ranks do not fill nodes."""
        gpus = num_ranks * tp * pp
        in_node = math.gcd(gpus, gpus_per_node)
        return Topology(num_nodes=gpus // in_node, gpus_per_node=in_node, tp=tp, pp=pp, **cut)

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
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
