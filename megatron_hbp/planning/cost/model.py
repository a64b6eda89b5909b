"""What a micro-batch costs: seconds of one pack on its gang, as fixed + per_token * T + per_square * S.

T are the tokens of the pack, S the sum of its squared sample lengths, c the CP degree, L the layers, and rho the share
of layers whose forward runs again in the backward pass (recompute). Per rank:

    linear     T / c * linear_flops * (3 + rho) / 3 / linear_rate       GEMMs: forward 1, backward 2, recompute rho
    attention  S / c * attention_flops * (3.5 + rho) / attention_rate   causal: forward 1, backward 2.5, recompute rho
    exchange   T / c * L * 2 e * (1 + b + rho) / bandwidth(c)           e elements per token, b of them in the backward
                                                                        for each in the forward (core/exchanges.py)
    fixed      micro_batch_seconds                                      parameter gathers, launches
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import planned
from megatron_hbp.planning.core.machine import Machine
from megatron_hbp.planning.core.model import AttentionShape, ModelSpec
from megatron_hbp.planning.core.tiers import Recompute, Tier, full_layers

MemoryTable = tuple[tuple[int, int], ...]
"""(local tokens, fewest recomputed layers that fit into memory), growing."""


@dataclass(frozen=True, kw_only=True)
class TierCost:
    """Seconds of a pack of one tier: fixed + per_token * T + per_square * S."""

    fixed: float
    per_token: float
    per_square: float

    def seconds(self, tokens: float, squares: float) -> float:
        """Modelled seconds of a pack of `tokens` whose samples' squared lengths sum to `squares`."""
        return self.fixed + self.per_token * tokens + self.per_square * squares


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """One model on one kind of machine; see the head of this module for the formula."""

    name: str
    model: ModelSpec
    machine: Machine
    """Speeds of one GPU."""
    tensor_parallel: int = 1
    """GPUs of one rank."""
    micro_batch_seconds: float = 0.0
    """Seconds that every micro-batch costs whatever it holds."""
    step_seconds: float = 0.0
    """Seconds that every step costs beside its micro-batches."""
    supervised: float = 1.0
    """Share of the tokens whose logits are computed."""
    recompute_layers: MemoryTable = ()
    """What fits into memory; empty where nothing is known."""
    recompute_ranks: int = 0
    """Data-parallel ranks that `recompute_layers` was measured on; fewer ranks hold more optimizer state each. 0: those
    that it is used with."""
    recompute_shares: tuple[tuple[str, float, float], ...] = ()
    """(modules joined by +, or "full", and the shares of the GEMMs' and of attention's forward that run again),
    measured; for "full" those of all layers. Without an entry the rules of `rule_shares` hold."""
    recompute_seconds: tuple[tuple[str, float], ...] = ()
    """(modules joined by +, or "full", seconds that a micro-batch costs more whatever it holds), measured; for "full"
    those of all layers: operators are launched again."""
    group_seconds: tuple[tuple[int, float], ...] = ()
    """(CP degree, seconds that a micro-batch costs more at this degree whatever it holds), measured."""
    linear_rate_without_experts: float | None = None
    """FLOP/s in GEMMs where the expert all-to-all is priced apart; None where `machine.linear_rate` never held it."""

    def __post_init__(self) -> None:
        kinds = {layer.attention.kind for _, layer in self.model.layers} - {"full"}
        if kinds:
            raise ConfigError(f"cost model {self.name}: attention of kind {min(kinds)} cannot be priced yet, only full")

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model.num_layers

    @cached_property
    def linear_flops(self) -> float:
        """FLOPs per token in all GEMMs, forward and backward."""
        return self.model.linear_flops(self.supervised)

    @cached_property
    def rank(self) -> Machine:
        """The machine as ranks of `tensor_parallel` GPUs see it."""
        return self.machine.of_ranks(self.tensor_parallel)

    @cached_property
    def rank_attention(self) -> AttentionShape:
        """Attention on one tensor-parallel rank."""
        return self.model.attention.on_tensor_parallel_rank(self.tensor_parallel)

    def with_machine(self, **changes: float) -> "CostModel":
        """The same model on a machine with other speeds or sizes."""
        return replace(self, machine=replace(self.machine, **changes))  # type: ignore[arg-type]

    def without_exchange(self) -> "CostModel":
        """The same with links of infinite speed."""
        return self.with_machine(node_bandwidth=np.inf, cluster_bandwidth=np.inf)

    def tier_cost(self, tier: Tier) -> TierCost:
        """Coefficients of `tier`."""
        cp_degree = tier.cp_degree
        linear, attention = self._recomputed_shares(tier.recompute)
        again = rule_shares(tier.recompute, self.num_layers)[1]  # a measured share holds more than the exchange
        exchange = self.num_layers * self._exchange_seconds(tier, again)
        policy, part = measured_policy(tier.recompute, self.num_layers)
        return TierCost(
            fixed=self.micro_batch_seconds
            + dict(self.group_seconds).get(cp_degree, 0.0)
            + part * dict(self.recompute_seconds).get(policy, 0.0),
            per_token=(self.linear_flops * (3 + linear) / 3 / self.rank.linear_rate + exchange) / cp_degree,
            per_square=self.model.attention_flops * (3.5 + attention) / self.rank.attention_rate / cp_degree,
        )

    def pack_seconds(
        self, tiers: Sequence[Tier], pack_tier: np.ndarray, tokens: np.ndarray, squares: np.ndarray
    ) -> np.ndarray:
        """Modelled seconds [packs] of packs of several tiers; all arguments but `tiers` are [packs]."""
        table = np.array([(c.fixed, c.per_token, c.per_square) for c in map(self.tier_cost, tiers)])
        fixed, per_token, per_square = table[pack_tier].T
        return fixed + per_token * tokens + per_square * squares

    def with_recompute(self, tier: Tier) -> Tier:
        """`tier` with the fewest recomputed layers that fit, where it names no recompute and the memory table knows."""
        if tier.recompute.granularity or not self.recompute_layers:
            return tier
        policy = least_recompute(self.recompute_layers, tier.local_tokens)
        if policy is None:
            limit = max(local for local, _ in self.recompute_layers)
            raise ConfigError(
                f"tier {tier}: {tier.local_tokens} tokens on a rank do not fit into memory with {self.name} "
                f"(at most {limit}); raise the CP degree, or name the recompute yourself (:none, :fullN)"
            )
        return replace(tier, recompute=policy)

    def check_layers(self, tiers: Sequence[Tier]) -> None:
        """Raise ConfigError for a tier that recomputes more layers than the model has."""
        for tier in tiers:
            if tier.recompute.num_layers > self.num_layers:
                raise ConfigError(f"tier {tier} recomputes more than the {self.num_layers} layers of {self.name}")

    def _exchange_seconds(self, tier: Tier, recomputed: float) -> float:
        """Seconds per local token in one layer, nothing hidden under attention; `recomputed` forwards run again."""
        c, shape = tier.cp_degree, self.rank_attention
        if c == 1:
            return 0.0
        kind = planned(tier.exchange, shape, c)
        received = 2.0 * self.tensor_parallel * kind.elements(shape, c) * (1 + kind.backward_bytes + recomputed)
        extra = self.tensor_parallel * kind.extra_flops(shape, c) * (4 + recomputed)
        return received / self.rank.bandwidth(c) + extra / self.rank.linear_rate

    def _recomputed_shares(self, recompute: Recompute) -> tuple[float, float]:
        """Shares (GEMMs, attention) of the forward that run again: as measured, or by rule."""
        name, part = measured_policy(recompute, self.num_layers)
        for measured, linear, attention in self.recompute_shares:
            if measured == name:
                return part * linear, part * attention
        return rule_shares(recompute, self.num_layers)


def least_recompute(memory: Sequence[tuple[int, int]], local_tokens: float) -> Recompute | None:
    """The least recompute that `local_tokens` on a rank fit with; None where nothing is enough."""
    fitting = [count for limit, count in memory if local_tokens <= limit]
    return full_layers(min(fitting)) if fitting else None


def measured_policy(recompute: Recompute, num_layers: int) -> tuple[str, float]:
    """(the name that a policy is measured under, empty for none; the share of that which it is)."""
    if recompute.granularity == "full":
        return "full", recompute.share_of_layers(num_layers)
    return "+".join(sorted(recompute.modules)), 1.0


def rule_shares(recompute: Recompute, num_layers: int) -> tuple[float, float]:
    """Shares (GEMMs, attention) of the forward that run again, if all layers were alike and norms free."""
    if recompute.granularity == "full":
        share = recompute.share_of_layers(num_layers)
        return share, share
    modules = recompute.modules
    # An MLP holds about two thirds of a dense layer's GEMM FLOPs.
    return (2 / 3 if "mlp" in modules or "moe" in modules else 0.0), float("core_attn" in modules)
