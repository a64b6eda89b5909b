"""What a micro-batch costs: seconds of one pack on its gang, as fixed + per_token * T + per_square * S.

T are the tokens of the pack, S the sum of its squared sample lengths, c the CP degree, L the layers, and rho the share
of layers whose forward runs again in the backward pass (recompute). Per rank:

    linear     T / c * linear_flops * (3 + rho) / 3 / linear_rate       GEMMs: forward 1, backward 2, recompute rho
    attention  S / c * attention_flops * (3.5 + rho) / attention_rate   causal: forward 1, backward 2.5, recompute rho
    exchange   T / c * L * 2 e * (1 + b + rho) / bandwidth(c)           e elements a token, b of them in the backward
                                                                        for each in the forward (planning/exchange.py)
    fixed      micro_batch_seconds                                      parameter gathers, launches

The constants of the presets were fitted by hand to tables 4, 18 and 19 of the paper (arXiv 2503.07680); profile your
own cluster for better ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import AUTO, AttentionShape, Machine, backward_bytes, elements, extra_flops
from megatron_hbp.planning.core.tiers import Recompute, Tier, layers


@dataclass(frozen=True, kw_only=True)
class TierCost:
    """Seconds of a pack of one tier: fixed + per_token * T + per_square * S."""

    fixed: float
    per_token: float
    per_square: float

    def seconds(self, tokens: np.ndarray | int, squares: np.ndarray | int) -> np.ndarray | float:
        """Modelled seconds [packs] of packs with `tokens` [packs] and summed squares `squares` [packs]."""
        return self.fixed + self.per_token * tokens + self.per_square * squares


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """One model on one kind of cluster; see the head of this module for the formula."""

    name: str
    num_layers: int
    linear_flops: float
    """FLOPs a token in all GEMMs, forward and backward."""
    attention_flops: float
    """FLOPs of the forward of causal attention, per squared token, all layers."""
    attention: AttentionShape | None
    """Heads and widths of a layer, which the exchange is priced by; None: exchanges cost nothing."""
    linear_rate: float
    """FLOP/s reached in GEMMs."""
    attention_rate: float
    """FLOP/s reached in attention."""
    node_bandwidth: float
    """Bytes/s of the exchange inside a node."""
    cluster_bandwidth: float
    """Bytes/s of the exchange across nodes."""
    micro_batch_seconds: float
    """Seconds that every micro-batch costs whatever it holds."""
    step_seconds: float = 0.0
    """Seconds that every step costs beside its micro-batches."""
    node_size: int = 8
    """Ranks in a node."""
    tensor_parallel: int = 1
    """Devices that count as one rank; rates and bandwidths are those of all of them."""
    max_cp_degree: int = 128
    """Heads: the exchange hands whole heads to ranks."""
    recompute_layers: tuple[tuple[int, int], ...] = ()
    """(local tokens, fewest recomputed layers that fit into memory), growing; from a profile."""
    recompute_shares: tuple[tuple[str, float, float], ...] = ()
    """(modules joined by +, or "full", and the shares of the GEMMs' and of attention's forward that run again),
    measured; for "full" those of all layers. Without an entry the rules of `_recomputed_shares` hold."""
    recompute_seconds: tuple[tuple[str, float], ...] = ()
    """(modules joined by +, or "full", seconds that a micro-batch costs more whatever it holds), measured; for "full"
    those of all layers: operators are launched again."""
    group_seconds: tuple[tuple[int, float], ...] = ()
    """(CP degree, seconds that a micro-batch costs more at this degree whatever it holds), measured."""

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
            per_token=(self.linear_flops * (3 + linear) / 3 / self.linear_rate + exchange) / cp_degree,
            per_square=self.attention_flops * (3.5 + attention) / self.attention_rate / cp_degree,
        )

    def pack_seconds(
        self, tiers: Sequence[Tier], pack_tier: np.ndarray, tokens: np.ndarray, squares: np.ndarray
    ) -> np.ndarray:
        """Modelled seconds [packs] of packs of several tiers; all arguments but `tiers` are [packs]."""
        table = np.array([(c.fixed, c.per_token, c.per_square) for c in map(self.tier_cost, tiers)])
        fixed, per_token, per_square = table[pack_tier].T
        return fixed + per_token * tokens + per_square * squares

    def with_recompute(self, tier: Tier) -> Tier:
        """`tier` with the fewest recomputed layers that fit, where it names no recompute and the profile knows."""
        if tier.recompute.granularity or not self.recompute_layers:
            return tier
        for local_tokens, count in self.recompute_layers:
            if tier.local_tokens <= local_tokens:
                return replace(tier, recompute=layers(count))
        limit = self.recompute_layers[-1][0]
        raise ConfigError(
            f"tier {tier}: {tier.local_tokens} tokens on a rank do not fit into memory with {self.name} "
            f"(at most {limit}); raise the CP degree, or name the recompute yourself (:fullN)"
        )

    @property
    def machine(self) -> Machine:
        """The speeds that exchanges are priced with."""
        return Machine(
            node_size=self.node_size,
            node_bandwidth=self.node_bandwidth,
            cluster_bandwidth=self.cluster_bandwidth,
            linear_rate=self.linear_rate,
            attention_rate=self.attention_rate,
        )

    def _exchange_seconds(self, tier: Tier, recomputed: float) -> float:
        """Seconds a local token in one layer, nothing hidden under attention; `recomputed` forwards run again."""
        if self.attention is None or tier.cp_degree == 1:
            return 0.0
        kind = "a2a" if tier.exchange == AUTO else tier.exchange
        shape, c = self.attention.on_tensor_parallel_rank(self.tensor_parallel), tier.cp_degree
        received = 2.0 * self.tensor_parallel * elements(kind, shape, c) * (1 + backward_bytes(kind) + recomputed)
        extra = self.tensor_parallel * extra_flops(kind, shape, c) * (4 + recomputed)
        return received / self.machine.bandwidth(c) + extra / self.linear_rate

    def _recomputed_shares(self, recompute: Recompute) -> tuple[float, float]:
        """Shares (GEMMs, attention) of the forward that run again: as measured, or by rule."""
        name, part = measured_policy(recompute, self.num_layers)
        for measured, linear, attention in self.recompute_shares:
            if measured == name:
                return part * linear, part * attention
        return rule_shares(recompute, self.num_layers)


def measured_policy(recompute: Recompute, num_layers: int) -> tuple[str, float]:
    """(the name that a policy is measured under, empty for none; the share of that which it is)."""
    if recompute.granularity == "full":
        return "full", recompute.share_of_layers(num_layers)
    return "+".join(sorted(recompute.modules)), 1.0


def rule_shares(recompute: Recompute, num_layers: int) -> tuple[float, float]:
    """Shares (GEMMs, attention) of the forward that run again, were all layers alike and norms free."""
    if recompute.granularity == "full":
        share = recompute.share_of_layers(num_layers)
        return share, share
    modules = recompute.modules
    # An MLP holds about two thirds of a dense layer's GEMM FLOPs.
    return (2 / 3 if "mlp" in modules or "moe" in modules else 0.0), float("core_attn" in modules)


def dense_model(
    name: str, *, num_layers: int, hidden: int, num_heads: int, num_kv_heads: int, head_width: int, parameters: float,
    **rates: object,
) -> CostModel:  # fmt: skip
    """Cost model of a dense GQA transformer; `parameters` are those in GEMMs, the output head included."""
    return CostModel(
        name=name,
        num_layers=num_layers,
        linear_flops=6.0 * parameters,
        attention_flops=2.0 * num_heads * head_width * num_layers,
        attention=AttentionShape(
            num_query_heads=num_heads, num_kv_heads=num_kv_heads, qk_width=head_width, v_width=head_width
        ),
        max_cp_degree=num_heads,
        **rates,  # type: ignore[arg-type]
    )


_H100 = {
    "linear_rate": 515e12,
    "attention_rate": 308e12,
    "node_bandwidth": 129e9,
    "cluster_bandwidth": 45e9,
}

DEEPSEEK_V2 = AttentionShape(
    num_query_heads=128, num_kv_heads=128, qk_width=192, v_width=128, q_latent=1536, kv_latent=512, rope_width=64
)

PRESETS: dict[str, CostModel] = {
    model.name: model
    for model in (
        dense_model(
            "llama3.1-8b-h100", num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_width=128,
            parameters=7.5e9, micro_batch_seconds=0.188,
            recompute_layers=((2048, 0), (4096, 8), (8192, 23), (16384, 28)), **_H100,
        ),
        # 70B and 32B: the 8B's rates; a tensor-parallel group of 8 (4) counts as one rank that is 8 (4) times as fast.
        dense_model(
            "llama3.1-70b-h100-tp8", num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, head_width=128,
            parameters=69.5e9, micro_batch_seconds=0.47, node_size=1, tensor_parallel=8,
            **(_H100 | {"linear_rate": 8 * 515e12, "attention_rate": 8 * 308e12, "cluster_bandwidth": 8 * 45e9}),
        ),
        dense_model(
            "qwen2.5-32b-h100-tp4", num_layers=64, hidden=5120, num_heads=40, num_kv_heads=8, head_width=128,
            parameters=31.8e9, micro_batch_seconds=0.376, node_size=2, tensor_parallel=4,
            **{key: 4 * rate for key, rate in _H100.items()},
        ),
        # 128 heads; q and k 192 wide, v and output 128 (latents expanded as in training); 21e9 active parameters.
        CostModel(
            name="deepseek-v2-h100", num_layers=60, linear_flops=6 * 21e9, attention_flops=128 * (192 + 128) * 60.0,
            attention=DEEPSEEK_V2, linear_rate=207e12, attention_rate=200e12,
            node_bandwidth=45e9, cluster_bandwidth=45e9, micro_batch_seconds=0.3, step_seconds=0.5,
        ),
    )
}  # fmt: skip
"""Shipped cost models by name."""

ATTENTION_ONLY = CostModel(
    name="attention-only", num_layers=1, linear_flops=0.0, attention_flops=1.0, attention=None, linear_rate=1.0,
    attention_rate=1.0, node_bandwidth=1.0, cluster_bandwidth=1.0, micro_batch_seconds=0.0,
)  # fmt: skip
"""Sum of squares over CP degree, what the paper balances and Megatron's dynamic CP weighs."""

DEFAULT_COST_MODEL = "llama3.1-8b-h100"


def preset(name: str) -> CostModel:
    """The shipped cost model `name`. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown cost model {name!r}; there are {', '.join(sorted(PRESETS))}, or a FILE.json of `hbp profile`"
        )
    return PRESETS[name]
